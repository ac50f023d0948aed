"""TrainingArguments as a user writes them: types, names, near misses."""

import dataclasses
import enum
import re
import types
import typing

import pytest

from runtime.errors import ConfigError
from runtime.tuning.arguments import kinds, training

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
    kinds = {name: argument.kind for name, argument in training.ARGUMENTS.items()}
    assert kinds == {name: kind_of(hints[name]) for name in fields}


def test_defaults_are_known_arguments() -> None:
    assert training.check(training.DEFAULTS, WHERE) == training.DEFAULTS


def test_values_get_their_types() -> None:
    given = {
        "learning_rate": "1e-4",
        "num_train_epochs": 2,
        "max_steps": "10",
        "bf16": "no",
        "report_to": "mlflow",
    }
    checked = training.check(given, WHERE)
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
        training.check({"report_to": ["tensorbord"]}, WHERE)


def test_unquoted_no_is_the_save_strategy_no() -> None:
    assert training.check({"save_strategy": False}, WHERE) == {"save_strategy": "no"}


def test_both_default_templates_pass() -> None:
    section = {
        "output_dir": "/mnt/results",
        "ddp_find_unused_parameters": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
    }
    assert training.check(section, WHERE) == section


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
        training.check(section, WHERE)
    assert WHERE in str(caught.value)
    assert message in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_older_transformers_are_accepted() -> None:
    given = {"evaluation_strategy": "epoch", "warmup_ratio": 0.1, "overwrite_output_dir": True}
    assert training.check(given, WHERE) == {"eval_strategy": "epoch", "warmup_steps": 0.1}
    assert not list(training.without_effect(given, WHERE))
    assert training.check({"group_by_length": True}, WHERE) == {"train_sampling_strategy": "group_by_length"}


def test_of_an_old_and_a_new_name_the_one_that_asks_for_something_counts() -> None:
    both = {"warmup_ratio": 0.1, "warmup_steps": 0}
    assert training.check(both, WHERE) == {"warmup_steps": 0.1}
    assert training.check(dict(reversed(both.items())), WHERE) == {"warmup_steps": 0.1}
    with pytest.raises(ConfigError, match="'warmup_ratio' and 'warmup_steps' are both set"):
        training.check({"warmup_ratio": 0.1, "warmup_steps": 20}, WHERE)


def test_names_of_sft_config_become_our_settings() -> None:
    given = {
        "max_length": "512",
        "packing": True,
        "completion_only_loss": True,
        "dataset_text_field": "body",
    }
    assert training.check(given, WHERE) == {}
    assert training.sft_settings(given, WHERE) == {
        "encoding": {"max_tokens": 512, "batching": "packed", "loss_on": "assistant"},
        "data": {"response_column": "body"},
    }
    assert training.sft_settings({"assistant_only_loss": False}, WHERE)["encoding"] == {"loss_on": "all"}


def test_what_transformers_writes_by_default_is_accepted_in_silence() -> None:
    from transformers import TrainingArguments

    dumped = TrainingArguments("out", use_cpu=True).to_dict()
    training.check(dumped, WHERE)
    assert not list(training.without_effect(dumped, WHERE))


TABLES = [*training.ARGUMENTS.items(), *training.OLDER.items(), *training.SFT.items()]


@pytest.mark.parametrize(("name", "argument"), TABLES, ids=[name for name, _ in TABLES])
def test_every_key_is_honoured_or_says_why_not(name: str, argument: kinds.Argument) -> None:
    assert bool(argument.why) == (argument.fate != "honoured" and not argument.keys)
    value = ASKING[argument.kind.rstrip("?")] if "|" not in argument.kind else argument.kind.split("|")[0]
    if argument.fate == "refused":
        with pytest.raises(ConfigError, match=f"'{name}' cannot be used: "):
            training.check({name: value}, WHERE)
        for silent in (None, *argument.silent):
            assert training.check({name: silent}, WHERE) == {}
    if argument.fate == "harmless" and not argument.keys and value not in argument.silent:
        assert training.check({name: value}, WHERE) == {}
        assert list(training.without_effect({name: value}, WHERE)) == [(name, argument.why)]


ASKING = {"bool": True, "str": "something", "int": 7, "float": 0.7, "list": ["x"], "mapping": {"x": 1}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"accelerator_config": {"foo": True}}, "'accelerator_config' has the unknown key 'foo'"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "cannot be used: set gradient_accumulation_steps",
        ),
        ({"fsdp_config": {"fsdp_activation_checkpointing": True}}, "set gradient_checkpointing: true"),
        (
            {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
            "the memory plan knows every layer or none",
        ),
        ({"log_level": "banana"}, "'log_level' is 'banana', expected one of passive"),
        ({"seed": -1}, "'seed' is -1, expected a number of at least 0 and at most 4294967295"),
        ({"seed": 2**32}, "'seed' is 4294967296, expected"),
        ({"adam_beta1": 1.5}, "'adam_beta1' is 1.5, expected a number of at least 0 and below 1"),
        ({"learning_rate": float("inf")}, "'learning_rate' is inf, expected a number"),
        ({"weight_decay": float("nan")}, "'weight_decay' is nan, expected a number"),
        ({"warmup_steps": -5}, "'warmup_steps' is -5.0, expected a number of steps, or below 1 a share"),
        ({"warmup_ratio": 2}, "'warmup_ratio' is 2, expected a share of the steps below 1"),
        ({"logging_steps": 1.5}, "'logging_steps' is 1.5, expected a number of steps"),
        ({"save_total_limit": 0}, "'save_total_limit' is 0, expected a number of at least 1"),
        ({"label_smoothing_factor": 1}, "'label_smoothing_factor' is 1.0, expected"),
        ({"include_num_input_tokens_seen": "some"}, "expected one of all, no, non_padding"),
        ({"train_sampling_strategy": "sorted"}, "expected one of random, sequential"),
    ],
)
def test_value_out_of_range_is_named_with_the_range(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        training.check(section, WHERE)


def test_nested_keys_without_effect_are_said() -> None:
    given = {"accelerator_config": {"split_batches": True, "dispatch_batches": None, "even_batches": True}}
    assert training.check(given, WHERE) == {}
    (name, _), *others = training.without_effect(given, WHERE)
    assert (name, others) == ("accelerator_config.split_batches", [])


def test_steps_without_a_strategy_are_a_strategy() -> None:
    assert training.check({"save_steps": 100}, WHERE)["save_strategy"] == "steps"
    assert training.check({"eval_steps": 0.1}, WHERE)["eval_strategy"] == "steps"
    assert training.check({"save_strategy": "no", "save_steps": 100}, WHERE)["save_strategy"] == "no"


@pytest.mark.parametrize(
    ("written", "sharded"),
    [
        (None, False),
        (False, False),
        ("", False),
        (True, True),
        ("full_shard auto_wrap", True),
        (["full_shard"], True),
    ],
)
def test_fsdp_is_sharding_of_everything(written: object, sharded: bool) -> None:
    checked = training.check({"fsdp": written}, WHERE)
    assert training.is_sharded(checked["fsdp"], "'fsdp'") == sharded


@pytest.mark.parametrize("written", ["shard_grad_op", "full_shard offload", "hybrid_shard"])
def test_another_kind_of_sharding_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="expected full_shard"):
        training.is_sharded(written, "'fsdp'")


def test_log_levels_are_transformers_own() -> None:
    from transformers.training_args import trainer_log_levels

    level = training.ARGUMENTS["log_level"].range
    assert level is not None
    assert set(level.kind.split("|")) == set(trainer_log_levels)
