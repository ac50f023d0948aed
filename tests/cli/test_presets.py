"""`runtime presets` as a user types it."""

import json

import pytest

from runtime.cli import main

pytestmark = pytest.mark.usefixtures("restored_logging")


def test_presets_are_listed_shown_and_machine_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["presets"], {}) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].split() == [
        "name",
        "parameters",
        "context",
        "download",
        "licence",
        "gated",
        "tune",
        "repository",
    ]
    assert main.run(["presets", "--json"], {}) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts) == len(listed) - 1
    assert main.run(["presets", "PHI-4", "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out)["dimensions"]["vocabulary"] == 100352
