"""A data file in the place of the model, and a model in the place of the data."""

import json
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.workspace import mixups

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.parquet", "my rows.jsonl", "data/part.csv", "data.yaml", "model/config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("rows.json").write_text(json.dumps([{"text": "a"}]))
    Path("manifest.json").write_text(json.dumps({"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace"}))
    return tmp_path


@pytest.mark.parametrize(
    ("target", "data", "command"),
    [
        ("rows.parquet", [], "runtime tune MODEL --data rows.parquet; MODEL is"),
        ("missing.parquet", [], "runtime tune MODEL --data missing.parquet; MODEL is"),
        ("rows.json", [], "runtime tune MODEL --data rows.json; MODEL is"),
        ("data", [], "runtime tune MODEL --data data; MODEL is"),
        ("https://x.example/rows", [], "runtime tune MODEL --data https://x.example/rows; MODEL is"),
        ("my rows.jsonl", [MODEL], f"runtime tune {MODEL} --data 'my rows.jsonl'"),
        ("rows.parquet", ["model"], "runtime tune model --data rows.parquet"),
        ("rows.parquet", ["Qwen/Qwen3-0.6B"], "runtime tune Qwen/Qwen3-0.6B --data rows.parquet"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_data_in_the_place_of_the_model_is_answered_with_the_command(
    target: str, data: list[str], command: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        mixups.check(target, data)
    assert f"{target} is data, and the model or the manifest comes first: {command}" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (MODEL, f"{MODEL} is a model, not data; a model comes first: runtime tune {MODEL} --data FILE"),
        ("model", "model is a model, not data; a model comes first: runtime tune model --data FILE"),
        ("tatsu-lab/alpaca", "hf download --repo-type dataset tatsu-lab/alpaca --local-dir alpaca"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_model_in_the_place_of_data_is_answered_too(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mixups.check(None, [word])
    assert message in str(caught.value)


@pytest.mark.parametrize("target", [MODEL, "model", "manifest.json", "data.yaml", "Qwen/Qwen3-0.6B", None])
@pytest.mark.parametrize(
    "word", ["rows.parquet", "data", "https://x.example/y", "me/rows:1", "oci:./layout", "some/rows.csv"]
)
@pytest.mark.usefixtures("folder")
def test_what_stands_in_its_place_passes(target: str | None, word: str) -> None:
    mixups.check(target, [word])
