"""What the README says exists: make targets, files, commands. Its long block is run by test_demo.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make ([a-z]+)`", README)) | set(
        re.findall(r"^make ([a-z]+)", README, re.MULTILINE)
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "line", re.findall(r"^runtime (?:presets|plan|tune --dry-run).*", README, re.MULTILINE)
)
def test_its_light_commands_answer_at_once(line: str) -> None:
    command = [str(Path(sys.executable).with_name("runtime")), *line.split()[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "phi-3-mini-128k-instruct" in done.stdout


def test_its_exit_codes_are_those_of_the_code() -> None:
    from runtime.errors import EXIT_CODES, Failure

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert documented == {code for kind, code in EXIT_CODES.items() if kind is not Failure} | {0}


def test_its_first_commands_on_ones_own_data_are_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from runtime.cli import main

    monkeypatch.chdir(tmp_path)
    first_screen = "\n".join(README.splitlines()[:30])
    commands = re.findall(r"^\$ runtime (tune \S+ --data (\S+).*)", first_screen, re.MULTILINE)
    assert len(commands) == 2
    for words, data in commands:
        Path(data).touch()
        assert main.run([*words.split(), "--dry-run"], {}) == 0
    assert "docs/data.md" in first_screen
    assert "docs/settings.md" in first_screen
    assert "tickets" in capsys.readouterr().out
