"""`runtime presets` as a user types it."""

import json

import pytest

from runtime.cli import main


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
        "serve",
        "tune",
        "repository",
    ]
    assert main.run(["presets", "--json"], {}) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts) == len(listed) - 1
    assert main.run(["presets", "PHI-4", "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out)["dimensions"]["vocabulary"] == 100352


def test_each_preset_says_how_it_is_served_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["presets", "--json"], {}) == 0
    facts = {preset["name"]: preset for preset in json.loads(capsys.readouterr().out)}
    served = {name: preset["served"] for name, preset in facts.items()}
    assert served["phi-4"] == served["falcon-7b"] == served["qwen3-8b"] == "batched"
    assert served["gemma-3-4b-instruct"] == served["gpt-oss-20b"] == served["qwen3.5-9b"] == "one at a time"
    assert served["ministral-3-8b-instruct"] == served["qwen3-8b-awq"] == "vLLM only"
    for preset in facts.values():
        assert (preset["not_batched"] is None) == (preset["served"] == "batched")
        assert (preset["untunable"] is None) == preset["tunable"]
    assert main.run(["presets", "gpt-oss-20b"], {}) == 0
    told = capsys.readouterr().out
    assert "one at a time" in told
    assert "experts are one tensor a layer" in told


def test_reasons_are_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gpt-oss-20b", "ministral-3-8b-instruct"):
        assert main.run(["presets", name, "--json"], {}) == 0
        facts = json.loads(capsys.readouterr().out)
        assert main.run(["presets", name], {}) == 0
        told = capsys.readouterr().out
        assert facts["not_batched"] in told
        assert facts["untunable"] in told
