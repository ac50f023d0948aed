"""Flags of `runtime tune`: they win, and each mistake is named."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.workspace.flags import is_image
from tests.workspace.documents import QLORA, SEED, load


def test_flags_win_and_are_named_as_the_source(tmp_path: Path) -> None:
    overrides = {
        "lora.r": 4,
        "LoraConfig.lora_alpha": 64,
        "training.seed": 7,
        "TrainingArguments.max_steps": 3,
    }
    resolved = load(SEED, tmp_path, config=QLORA, overrides=overrides)
    job = resolved.config
    assert (job.lora.r, job.lora.alpha, job.training["seed"], job.training["max_steps"]) == (4, 64, 7, 3)
    assert resolved.sources["lora.r"] == "flag --set lora.r"
    assert resolved.sources["lora.alpha"] == "flag --set LoraConfig.lora_alpha"
    assert resolved.sources["training.seed"] == "flag --set training.seed"
    assert resolved.sources["training.max_steps"] == "flag --set TrainingArguments.max_steps"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lorra.r", 8, "unknown setting.*'lora'"),
        ("lora.rankk", 8, r"--set: unknown key 'lora\.rankk'"),
        ("sources", {}, "unknown setting"),
        ("lora.r", "eight", r"--set: 'lora\.r' is 'eight'"),
        ("training.learning_rat", 1, "learning_rat'.*'learning_rate'"),
        ("LoraConfig.rr", 1, r"unknown key 'LoraConfig\.rr'"),
        ("hub_token", "x", "HF_TOKEN"),
        ("data", 1, r"data\.urls"),
        ("extension", "xlsx", r"--set data\.extension is 'xlsx', expected one of parquet, .*spreadsheet"),
    ],
)
def test_wrong_flag_is_named(name: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(SEED, tmp_path, overrides={name: value})


@pytest.mark.parametrize(
    ("word", "image"),
    [
        ("oci:./x", True),
        ("registry.example.com/a/b:1", True),
        ("localhost:5000/a", True),
        ("me/adapter:1", True),
        ("docker://a/b", True),
        ("./a/b", False),
        ("results/run1", False),
        ("/abs/x:1", False),
        ("~/x", False),
        ("out", False),
        ("../a.b/c", False),
    ],
)
def test_value_of_output_is_an_image_or_a_directory(word: str, image: bool) -> None:
    assert is_image(word) is image


def test_output_flag_replaces_the_placeholders(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path, overrides={"--output": [str(tmp_path / "out")]})
    job = resolved.ready()
    assert (job.output.folder, job.output.image) == (tmp_path / "out", None)


def test_data_flag_takes_file_directory_address_and_image(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.touch()
    (tmp_path / "layout").mkdir()
    layout = f"oci:{tmp_path}/layout:data"
    results = {
        word: load(SEED, tmp_path, overrides={"--data": [word]}).config.data
        for word in (str(file), str(tmp_path), "https://x.example/y.parquet", layout)
    }
    assert results[str(file)].file == file
    assert results[str(tmp_path)].folder == tmp_path
    assert results["https://x.example/y.parquet"].urls == ("https://x.example/y.parquet",)
    assert results[layout].image == layout
    assert [bool(data.urls) for data in results.values()] == [False, False, True, False]


def test_an_output_with_a_scheme_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"write an image without the scheme, as x\.io/a:1"):
        load(SEED, tmp_path, overrides={"--output": ["https://x.io/a:1"]})
