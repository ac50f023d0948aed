"""Helpers for tests of the command line."""

from pathlib import Path

import pytest


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failure_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on standard error, and hold that it is one and no traceback."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    assert len(lines) == 1, captured.err
    return lines[0]
