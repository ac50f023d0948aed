"""LoraConfig as a user writes it: types, what training refuses, what serving will not take."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.tuning.arguments import lora
from runtime.tuning.settings import Lora
from runtime.workspace.sections import LoraSection
from tests.workspace.documents import SEED, load


def test_keys_are_those_of_peft() -> None:
    from peft import LoraConfig

    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert lora.KEYS | LoraSection.model_fields.keys() == theirs
    tables = [
        lora.LoraOptions.model_fields,
        lora.REFUSED,
        lora.HARMLESS,
        lora.FIXED,
        LoraSection.model_fields,
    ]
    assert sum(map(len, tables)) == len(theirs)


def test_what_peft_writes_by_default_is_accepted_in_silence() -> None:
    from peft import LoraConfig

    written = {
        **LoraConfig(task_type="CAUSAL_LM").to_dict(),
        "peft_type": "LORA",
        "peft_version": None,
    }
    lora.read_options({key: v for key, v in written.items() if key not in LoraSection.model_fields}, "f")
    assert not lora.without_effect(written)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias": "some"}, "'bias' is 'some'"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern'"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"alpha_pattern": {"(": 8}}, "'(' is no regular expression"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"layer_replication": [[0]]}, "layer_replication"),
        ({"trainable_token_indices": ["x"]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"use_dora": "perhaps"}, "'use_dora' is 'perhaps'"),
        ({"megatron_config": {"x": 1}}, "LoraConfig.megatron_config cannot be used: Megatron"),
        ({"use_qalora": True}, "use_qalora cannot be used"),
        ({"eva_config": {"rho": 2}}, "it reads data before training begins"),
        ({"task_type": "SEQ_CLS"}, "LoraConfig.task_type is 'SEQ_CLS', expected CAUSAL_LM"),
        ({"inference_mode": True}, "inference_mode is True, expected False"),
        ({"lora_bias": True, "use_dora": True}, "both lora_bias and use_dora"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias goes with"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "needs target_modules by name"),
        ({"target_modules": []}, "target_modules names nothing"),
        ({"target_parameters": ["x.weight"], "lora_dropout": 0.1}, "needs lora_dropout 0"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks"),
        ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
        ({"init_lora_weights": "pissa_niter_x"}, "expected pissa_niter_ and a number"),
    ],
)
def test_wrong_options_are_named_before_anything_is_loaded(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    overrides = {f"LoraConfig.{key}": value for key, value in given.items()}
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(SEED, tmp_path, overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"modules_to_save": "lm_head"}, {"modules_to_save": ["lm_head"]}),
        ({"rank_pattern": {"q_proj": "8"}}, {"rank_pattern": {"q_proj": 8}}),
        ({"layers_to_transform": "0"}, {"layers_to_transform": 0}),
        (
            {"alpha_pattern": {r".*layers\.0\..*q_proj": 64}},
            {"alpha_pattern": {r".*layers\.0\..*q_proj": 64}},
        ),
        ({"layer_replication": [[0, 2], [0, 2]]}, {"layer_replication": [(0, 2), (0, 2)]}),
    ],
)
def test_options_get_their_types(given: dict[str, Any], options: dict[str, Any]) -> None:
    assert lora.read_options(given, "f") == options


@pytest.mark.parametrize(
    ("written", "targets"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        (r".*layers\.0\..*(q|v)_proj", r".*layers\.0\..*(q|v)_proj"),
        (["q_proj"], ["q_proj"]),
    ],
)
def test_names_are_told_from_an_expression(written: Any, targets: Any) -> None:
    assert lora.target_names(written) == targets


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5]},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 2]]},
        {"lora_bias": True},
        {"bias": "all"},
    ],
)
def test_what_serving_does_not_take_is_said_before_training(option: dict[str, Any], tmp_path: Path) -> None:
    (key, value), *_ = option.items()
    warnings = load(SEED, tmp_path, overrides={f"LoraConfig.{key}": value}).warnings
    (said,) = [text for text in warnings if "cannot be served as it is" in text]
    assert f"{key}: " in said
    merged = key not in ("alora_invocation_tokens", "layer_replication")
    assert ("runtime merge makes a model of it" if merged else "nor can it be merged") in said
    assert lora.unserved(Lora(options={"use_rslora": True, "init_lora_weights": "pissa"})) is None


def test_keys_without_effect_are_said(tmp_path: Path) -> None:
    warnings = load(SEED, tmp_path, overrides={"LoraConfig.fan_in_fan_out": True}).warnings
    assert any("fan_in_fan_out has no effect here: the kind of each layer" in text for text in warnings)
