"""The sections of training_config.yaml: stock templates, and one readable line for each mistake."""

from pathlib import Path

import pytest
import yaml

from runtime.errors import ConfigError
from tests.workspace.documents import LORA, QLORA, SEED, STOCK, config_map, load, manifest, write


@pytest.mark.parametrize(("method", "file"), [("qlora", QLORA), ("lora", LORA)])
def test_stock_templates_are_accepted_unchanged(method: str, file: Path, tmp_path: Path) -> None:
    resolved = load(write(tmp_path, manifest(tuning__method=method)), tmp_path, config=file)
    job = resolved.config
    assert (job.lora.r, job.lora.alpha, job.lora.dropout) == (8, 8, 0.0)
    assert job.training["save_strategy"] == "no"
    assert job.training["per_device_train_batch_size"] == 1
    assert "output_dir" not in job.training
    assert job.data.train_share == 1
    assert resolved.sources["lora.r"] == f"{file.name} LoraConfig.r"


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    text = STOCK.replace("TrainingArguments:", "TrainingArguments:\n    learning_rate: 1e-5")
    assert (
        load(write(tmp_path, manifest(), config_map(text)), tmp_path).config.training["learning_rate"] == 1e-5
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("LoraConfig:", "LoraConfg:", "unknown key 'LoraConfg'.*'LoraConfig'"),
        ("lora_alpha: 8", "lora_alpa: 8", r"unknown key 'LoraConfig\.lora_alpa'.*'lora_alpha'"),
        ("lora_dropout: 0.0", "lora_dropout: x", "'lora_dropout' is 'x'"),
        ("r: 8", "r: 0", "'r' is 0"),
        (
            "load_in_4bit: true",
            "load_in_4bit: true\n    load_in_8bit: true",
            "'load_in_4bit' and 'load_in_8bit' true",
        ),
        ("load_in_4bit: true", "load_in_4bit: false", "method qlora needs 'load_in_4bit: true'"),
        ("load_in_4bit: true", "load_in_4bit: maybe", r"'QuantizationConfig\.load_in_4bit' is 'maybe'"),
        ("shuffle_dataset: true", "shuffle_dataset: maybe", r"'DatasetConfig\.shuffle_dataset' is 'maybe'"),
        ("train_test_split: 1", "train_test_split: 1.5", r"'DatasetConfig\.train_test_split' is 1\.5"),
        ('output_dir: "/mnt/results"', "output_dir: 3", "output_dir"),
        ('torch_dtype: "bfloat16"', "torch_dtype: fp8", "expected auto, bfloat16, float16 or float32"),
        ('device_map: "auto"', "chat_template: nowhere.jinja", "no chat template 'nowhere.jinja'"),
        (
            "per_device_train_batch_size: 1",
            "per_device_train_batchsize: 1",
            "TrainingArguments.*'per_device_train_batchsize'",
        ),
        ("training_config:", "trainning_config:", "did you mean 'training_config'"),
        ("  LoraConfig:\n    r: 8", "  LoraConfig:\n    r: 8\n    r: 9", "written twice"),
        ("mlm: true", "mlmm: true", r"'DataCollator\.mlmm'.*'mlm'"),
    ],
)
def test_wrong_training_config_is_one_line_with_the_key(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    assert old in STOCK
    config.write_text(STOCK.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load(SEED, tmp_path, config=config)
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_method_lora_refuses_quantisation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method lora trains on unquantised weights"):
        load(write(tmp_path, manifest(tuning__method="lora")), tmp_path, config=QLORA)


@pytest.mark.parametrize(
    "section", ["ModelConfig", "LoraConfig", "TrainingArguments", "DataCollator", "DatasetConfig"]
)
def test_empty_section_is_its_defaults(section: str, tmp_path: Path) -> None:
    document = yaml.safe_load(STOCK)
    document["training_config"][section] = None
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(document))
    load(SEED, tmp_path, config=config)
