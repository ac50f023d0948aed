"""What docs/ says exists: files of the architecture page, and decisions that are numbered and dated."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ANCHORS = ["", "runtime", "runtime/tuning", "runtime/serving", "runtime/serving/engine"]
"""Folders that the page's paths start from."""


def exists(path: str) -> bool:
    return any((ROOT / anchor / path).exists() for anchor in ANCHORS)


def test_every_file_that_the_architecture_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|md|toml)|[\w]+(?:/[\w]+)*/)`", ARCHITECTURE)
    assert len(named) > 30
    assert not [path for path in named if not exists(path)]


def test_every_file_of_the_tree_exists() -> None:
    tree = re.search(r"^```\n(presets/.*?)^```", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    assert tree
    folders: list[tuple[int, Path]] = []
    for line in tree[1].splitlines():
        depth = len(line) - len(line.lstrip())
        entries = re.split(r"\s{2,}", line.strip())[0].split()
        folders = [(level, folder) for level, folder in folders if level < depth]
        parent = folders[-1][1] if folders else ROOT
        assert not [entry for entry in entries if not (parent / entry).exists()], line
        folders.append((depth, parent / entries[0]))


def test_decisions_are_numbered_and_dated() -> None:
    paths = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(path.name[:3]) for path in paths] == list(range(1, len(paths) + 1))
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert re.match(rf"# {int(path.name[:3])}\. .+\n\n\d{{4}}-\d\d-\d\d\n\n\S", text), path.name


def test_every_statement_about_security_is_held_by_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    defended = text[text.index("## Who") : text.index("## What is not")]
    statements = [line for line in defended.splitlines() if line.startswith("- ")]
    assert len(statements) > 20
    for line in statements:
        found = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)`$", line)
        assert found, line
        assert re.search(
            rf"^(?:async )?def {found[2]}\(", (ROOT / found[1]).read_text("utf-8"), re.MULTILINE
        ), line
