"""TrainingArguments as a user writes them: types, names, near misses."""

import dataclasses
import enum
import types
import typing

import pytest

from runtime.errors import ConfigError
from runtime.tuning import training_arguments

WHERE = "config.yaml TrainingArguments"


def kind_of(annotation: object) -> str:
    """Return the table's type name for a field's annotation."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = list(typing.get_args(annotation)) if union else [annotation]
    optional = "?" if type(None) in parts else ""
    parts = [part for part in parts if part is not type(None)]
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    if enums:
        return "|".join(sorted(str(member.value) for member in enums[0])) + optional
    if any(part is dict or typing.get_origin(part) is dict for part in parts):
        return "mapping" + optional
    if any(typing.get_origin(part) is list for part in parts):
        return "list" + optional
    if bool in parts and str in parts:
        return "str" + optional
    first = parts[0]
    return (first.__name__ if first in (int, float, bool, str) else "str") + optional


def test_table_is_transformers_own_class() -> None:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    assert {name: kind_of(hints[name]) for name in fields} == training_arguments.KINDS


def test_defaults_are_known_arguments() -> None:
    assert training_arguments.check(training_arguments.DEFAULTS, WHERE) == training_arguments.DEFAULTS


def test_values_get_their_types() -> None:
    given = {
        "learning_rate": "1e-4",
        "num_train_epochs": 2,
        "max_steps": "10",
        "bf16": "no",
        "report_to": "mlflow",
    }
    checked = training_arguments.check(given, WHERE)
    assert checked == {
        "learning_rate": 1e-4,
        "num_train_epochs": 2.0,
        "max_steps": 10,
        "bf16": False,
        "report_to": ["mlflow"],
    }
    assert isinstance(checked["num_train_epochs"], float)


def test_unknown_logger_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'report_to' holds 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        training_arguments.check({"report_to": ["tensorbord"]}, WHERE)


def test_unquoted_no_is_the_save_strategy_no() -> None:
    assert training_arguments.check({"save_strategy": False}, WHERE) == {"save_strategy": "no"}


def test_both_default_templates_pass() -> None:
    section = {
        "output_dir": "/mnt/results",
        "ddp_find_unused_parameters": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
    }
    assert training_arguments.check(section, WHERE) == section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte' (did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "'learning_rate' is 'fast', expected a number"),
        ({"learning_rate": -1}, "'learning_rate' is -1.0, expected a number above 0"),
        ({"num_train_epochs": True}, "expected a number"),
        ({"max_steps": 1.5}, "'max_steps' is 1.5, expected a whole number"),
        ({"optim": "adamw_torh"}, "did you mean 'adamw_torch'"),
        ({"bf16": "maybe"}, "'bf16' is 'maybe', expected true or false"),
        ({"lr_scheduler_kwargs": 3}, "expected keys and values"),
        ({"fp16": True, "bf16": True}, "both true"),
        ({"deepspeed": "zero3.json"}, "DeepSpeed is not part of this image"),
        ({"hub_token": "hf_secretsecret"}, "set the environment variable HF_TOKEN"),
    ],
)
def test_error_names_key_value_and_expectation(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        training_arguments.check(section, WHERE)
    assert WHERE in str(caught.value)
    assert message in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_older_transformers_are_accepted() -> None:
    given = {"evaluation_strategy": "epoch", "warmup_ratio": 0.1, "overwrite_output_dir": True}
    assert training_arguments.check(given, WHERE) == {"eval_strategy": "epoch", "warmup_steps": 0.1}


def test_names_of_sft_config_become_our_settings() -> None:
    given = {"max_length": "512", "packing": True, "completion_only_loss": True, "dataset_text_field": "body"}
    assert training_arguments.check(given, WHERE) == {}
    assert training_arguments.sft_settings(given, WHERE) == {
        "encoding": {"max_tokens": 512, "batching": "packed", "loss_on": "assistant"},
        "data": {"response_column": "body"},
    }
    assert training_arguments.sft_settings({"assistant_only_loss": False}, WHERE)["encoding"] == {
        "loss_on": "all"
    }
