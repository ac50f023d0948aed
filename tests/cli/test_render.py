"""What a dry run shows: values, sources and placeholders, never a secret."""

import json
import sys
from pathlib import Path

import pytest

from runtime.cli import main, render

ROOT = Path(__file__).parents[2]
SEED = str(ROOT / "examples/fine-tuning/kaito_workspace_tuning_phi_3.yaml")
QLORA = str(ROOT / "examples/fine-tuning/qlora-params-template.yaml")


def test_commands_that_only_show_name_placeholders_in_the_same_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.run(["tune", SEED, "--dry-run"], {}) == 0
    shown = {line for line in capsys.readouterr().out.splitlines() if line.startswith("placeholder: ")}
    assert main.run(["manifest", SEED, "--image", "x/y:1"], {}) == 0
    logged = {json.loads(line)["msg"] for line in capsys.readouterr().err.splitlines()}
    assert len(shown) == 2
    assert shown <= logged


def test_dry_run_shows_values_sources_and_placeholders(
    capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    assert main.run(["tune", "--dry-run", SEED, "--config", QLORA, "--set", "lora.r=4"], {}) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.strip()}
    assert rows["lora.r"] == "4 flag --set lora.r"
    assert rows["lora.alpha"] == "8 qlora-params-template.yaml LoraConfig.lora_alpha"
    assert rows["training.num_train_epochs"] == "3.0 default"
    assert "072cb7562cb8c4adf682a8e186aaafa49469eb5d" in rows["model.revision"]
    assert "(MIT, 3.8B parameters" in out
    assert "placeholder: " in out
    assert "IMAGE_NAME_HERE" in out
    assert "warning: " in out
    assert "Standard_NC6s_v3" in out


def test_dry_run_as_json_holds_the_same(capsys: pytest.CaptureFixture[str], away: Path) -> None:
    assert main.run(["tune", "--dry-run", "--json", SEED], {}) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["lora.targets"] == {"value": "all-linear", "source": "default"}
    assert len(shown["placeholders"]) == 2


def test_table_on_a_terminal_is_drawn_by_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    render.table(("setting", "value"), [("lora.r", "[bold]8")])
    out = capsys.readouterr().out
    assert "setting" in out
    assert "[bold]8" in out, "a value is text, never markup"


def test_dry_run_shows_no_secret(capsys: pytest.CaptureFixture[str], away: Path) -> None:
    url = "https://user:pw@x.example/rows.parquet?sig=SECRET1"
    for extra in ([], ["--json"]):
        arguments = ["tune", "phi-4", "--dry-run", "--data", url, *extra]
        assert main.run(arguments, {"HF_TOKEN": "hf_SECRET2SECRET2"}) == 0
        assert main.run(["serve", "phi-4", "--dry-run", *extra], {"RUNTIME_API_KEY": "SECRET3"}) == 0
    captured = capsys.readouterr()
    assert "SECRET" not in captured.out + captured.err
    assert "user:pw" not in captured.out


def test_file_of_api_keys_is_named_by_flag_or_variable(
    capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    for words, environ, shown in (
        (["--api-key-file", "a"], {"RUNTIME_API_KEY_FILE": "b"}, "a"),
        ([], {"RUNTIME_API_KEY_FILE": "b"}, "b"),
        ([], {"RUNTIME_API_KEY_FILE": ""}, None),
    ):
        assert main.run(["serve", "phi-4", "--dry-run", "--json", *words], environ) == 0
        settings = json.loads(capsys.readouterr().out)["settings"]
        assert settings["api_key_file"]["value"] == shown
