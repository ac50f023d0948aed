"""Names of settings on the command line: found when unique, answered when people call them otherwise."""

from pathlib import Path
from typing import Any

import pytest

from runtime.config import flatten
from runtime.errors import ConfigError
from runtime.tuning.arguments import lora
from runtime.tuning.arguments.training import ARGUMENTS
from runtime.workspace import names
from runtime.workspace.names import COMMON_NAMES, groups, resolve, section_keys
from tests.workspace.documents import QLORA, SEED, load


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("learning_rate", 1e-3, "training.learning_rate"),
        ("seed", 3, "training.seed"),
        ("evaluation_strategy", "no", "training.eval_strategy"),
        ("r", 4, "lora.r"),
        ("alpha", 3, "lora.alpha"),
        ("lora_alpha", 3, "lora.alpha"),
        ("max_length", 99, "encoding.max_tokens"),
        ("training.max_length", 99, "encoding.max_tokens"),
        ("training.output_dir", "/tmp/x", "output.folder"),
        ("bits", 8, "quantization.bits"),
        ("use_rslora", True, "lora.options.use_rslora"),
        ("shuffle_dataset", False, "data.shuffle"),
        ("tokens_per_pass", 99, "tokens_per_pass"),
    ],
)
def test_a_name_without_a_dot_finds_its_setting(name: str, value: Any, setting: str, tmp_path: Path) -> None:
    job = load(SEED, tmp_path, config=QLORA, overrides={name: value}).config
    assert flatten(job.model_dump(mode="json"))[setting] == value


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("lr", "learning_rate here, as in --set learning_rate=2e-4"),
        ("epochs", "as in --set num_train_epochs=3"),
        ("batch_size", "as in --set per_device_train_batch_size=4"),
        ("rank", "as in --set r=16"),
        ("max-len", "as in --set max_length=1024"),
        ("lora.rank", "as in --set r=16"),
        ("training.lr", "as in --set learning_rate=2e-4"),
        ("test_size", r"train_test_split here \(the part to train on\)"),
        ("LoraConfig.rank", "it is 'r', as in r: 16"),
        ("LoraConfig.learning_rate", "'learning_rate' belongs into TrainingArguments"),
        ("image", "model.image or data.image or output.image"),
        ("learning_rat", "did you mean 'learning_rate'"),
        ("max_lenght", "did you mean 'max_length'"),
        ("lora_alfa", "did you mean 'lora_alpha'"),
        ("bnb_4bit_quant_typ", "did you mean 'bnb_4bit_quant_type'"),
        ("train_split", r"train_test_split here \(the part to train on\)"),
        ("use_qlora", "as in --set load_in_4bit=true"),
        ("dora", "as in --set use_dora=true"),
        ("qqq", "known: checkpoint_minutes"),
    ],
)
def test_another_name_is_answered_with_the_right_one(name: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        resolve({name: 1})


def test_all_wrong_names_are_told_at_once() -> None:
    wrong = {"lr": 1, "learning_rat": 1, "lora.rankk": 1, "LoraConfig.lora_alfa": 1, "lorra.r": 1}
    with pytest.raises(ConfigError) as refused:
        resolve({**wrong, "seed": 3})
    message = str(refused.value)
    assert message.count("--set ") == 2  # the first, and the example in its answer
    for name in wrong:
        assert name in message
    for answer in ("learning_rate=2e-4", "'learning_rate'?", "'lora_alpha'", "'lora'?"):
        assert answer in message, message


def test_the_token_is_not_offered_as_a_setting() -> None:
    with pytest.raises(ConfigError) as refused:
        resolve({"qqq": 1})
    assert "hub_token" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "key", "answer"),
    [
        ("TrainingArguments", "lr", "unknown key 'TrainingArguments.lr'; it is 'learning_rate', as in"),
        ("TrainingArguments", "epochs", "it is 'num_train_epochs', as in num_train_epochs: 3"),
        ("TrainingArguments", "batch_size", "it is 'per_device_train_batch_size', as in"),
        ("TrainingArguments", "rank", "it is 'r' in LoraConfig, as in r: 16"),
        ("LoraConfig", "rank", "it is 'r', as in r: 16"),
        ("LoraConfig", "alpha", "it is 'lora_alpha', as in lora_alpha: 32"),
        ("LoraConfig", "dropout", "it is 'lora_dropout', as in lora_dropout: 0.05"),
        ("DatasetConfig", "max_length", "it is 'max_length' in TrainingArguments"),
        ("ModelConfig", "lora_alpha", "'lora_alpha' belongs into LoraConfig"),
        ("DatasetConfig", "test_size", r"it is 'train_test_split' \(the part to train on\)"),
    ],
)
def test_a_key_of_the_file_is_answered_likewise(section: str, key: str, answer: str, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(f"training_config:\n  {section}:\n    {key}: 1\n")
    with pytest.raises(ConfigError, match=f"own.yaml: .*{answer}"):
        load(SEED, tmp_path, config=config)


def setting_names() -> set[str]:
    tables = {**groups(), **section_keys()}
    return {f"{table}.{name}" for table, fields in tables.items() for name in fields}


def test_every_answer_names_a_setting_that_its_own_name_finds() -> None:
    for key, example in COMMON_NAMES.values():
        section, _, name = key.partition(".")
        assert name in section_keys()[section]
        assert next(iter(resolve({name: example}))) in setting_names()


def test_common_names_do_not_hide_settings() -> None:
    ours = {name for fields in groups().values() for name in fields}
    hidden = {"alpha", "dropout", "max_tokens", "max_length", "max_seq_length"}
    assert COMMON_NAMES.keys() & (ours | ARGUMENTS.keys() | section_keys()["TrainingArguments"]) == hidden
    names.check_section("DataCollator", ["lr"], "a section without settings has its own message")
    names.check_section("LoraConfig", lora.LoraOptions.model_fields, "known keys pass")
