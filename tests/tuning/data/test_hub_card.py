"""The card of a data set from the hub says which files are one data set."""

from pathlib import Path

import pytest

from runtime.errors import DataError
from runtime.tuning.data import hub_card

FILES = ("main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet", "extra.json", "dev.json")


def card(folder: Path, text: str) -> dict[str, str] | None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "README.md").write_text(f"---\nlicense: mit\n{text}\n---\n# A page\n")
    found = hub_card.read_card(folder, [folder / name for name in FILES])
    return found and {path.relative_to(folder).as_posix(): split for path, split in found.items()}


@pytest.mark.parametrize(
    ("text", "files"),
    [
        (
            "configs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n"
            "    path: main/train-*\n"
            "  - split: test\n    path: main/test-*\n- config_name: socratic\n  data_files: socratic/*",
            {"main/train-0.parquet": "train", "main/test-0.parquet": "test"},
        ),
        (
            "configs:\n- data_files:\n    train: ['main/train*', 'socratic/train*']\n    dev: dev.json",
            {"main/train-0.parquet": "train", "socratic/train-0.parquet": "train", "dev.json": "validation"},
        ),
        ("configs:\n- data_dir: socratic\n  data_files: '*.parquet'", {"socratic/train-0.parquet": "train"}),
        ("configs:\n- data_files: '**/*.json'", {"extra.json": "train", "dev.json": "train"}),
        ("configs:\n- data_files: ../../etc/*", None),
        ("configs:\n- config_name: main", None),
        ("configs: {a: 1}", None),
        ("configs: [", None),
        ("tags: [x]", None),
    ],
)
def test_the_default_configuration_names_files_and_splits(
    tmp_path: Path, text: str, files: dict[str, str] | None
) -> None:
    assert card(tmp_path, text) == files


def test_several_data_sets_without_a_default_are_an_error_that_names_them(tmp_path: Path) -> None:
    entries = "".join(f"\n- config_name: {name}\n  data_files: {name}/*" for name in ("main", "socratic"))
    with pytest.raises(
        DataError, match=r"describes 2 data sets \(main, socratic\); .* \(main/\*, socratic/\*\)"
    ):
        card(tmp_path, f"configs:{entries}")


def test_a_folder_without_a_card_has_none(tmp_path: Path) -> None:
    assert hub_card.read_card(tmp_path, []) is None
    (tmp_path / "README.md").write_text("x")
    assert hub_card.read_card(tmp_path, []) is None
