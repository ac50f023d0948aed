"""The table of `peft.LoraConfig` keys: the types of those that training honours, and why others are not.

peft raises on a wrong one only once the model is loaded, and drops some without a word. What serving and
merging make of an adapter is runtime/adapters/lora_config.py. Does not know models. Start at `read_options`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from runtime.adapters import lora_config
from runtime.config import Sparse, parse, without_nulls
from runtime.errors import ConfigError
from runtime.tuning.settings import Lora

_Index = Annotated[int, Field(ge=0)]
_Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class LoraOptions(Sparse):
    """The keys that are handed to peft, beside the adapter's shape (`Lora`)."""

    bias: Literal["none", "all", "lora_only"] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    init_lora_weights: bool | str | None = None
    loftq_config: dict[str, Any] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: _Index | list[_Index] | None = None
    layers_pattern: str | list[str] | None = None
    layer_replication: list[tuple[_Index, _Index]] | None = None
    modules_to_save: _Names | None = None
    trainable_token_indices: list[_Index] | dict[str, list[_Index]] | None = None
    alora_invocation_tokens: list[_Index] | None = Field(None, min_length=1)
    target_parameters: _Names | None = None
    ensure_weight_tying: bool | None = None


REFUSED = {
    "megatron_config": "Megatron's layers are not part of this image",
    "use_qalora": "QA-LoRA is for bases that GPTQ quantised; use load_in_4bit without it",
    "use_bdlora": "block-diagonal matrices are not trained here; leave it out",
    "arrow_config": "it combines adapters that exist already; leave it out",
    "kasa_config": "KaSA changes the base weights; leave it out",
    "velora_config": "VeLoRA has weights that are not saved here; leave it out",
    "monteclora_config": "MonteCLoRA needs a loss of its own; leave it out",
    "lora_ga_config": "it reads data before training begins; see init_lora_weights",
    "eva_config": "it reads data before training begins; see init_lora_weights",
    "corda_config": "it reads data before training begins; see init_lora_weights",
}
"""Keys that are errors unless they ask for nothing."""

HARMLESS = {
    "fan_in_fan_out": "the kind of each layer decides it",
    "megatron_core": "Megatron's layers are not part of this image",
    "qalora_group_size": "QA-LoRA is not used",
    "runtime_config": "the adapter stays on the device",
    "base_model_name_or_path": "it is written when the adapter is saved",
    "revision": "it is written when the adapter is saved; the base model's is ModelConfig.revision",
    "auto_mapping": "it is written when the adapter is saved",
    "peft_version": "it is written when the adapter is saved",
}
"""Keys without effect."""

SILENT = {"megatron_core": ("megatron.core",), "qalora_group_size": (16,)}
"""Their defaults in files that peft writes."""

FIXED = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": False}
"""Keys that have one right value."""

KEYS = frozenset(LoraOptions.model_fields) | REFUSED.keys() | HARMLESS.keys() | FIXED.keys()
"""All of peft's LoraConfig but the shape (a test compares)."""

_PATTERNS = ("rank_pattern", "alpha_pattern")


def read_options(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return those of the section's keys that are handed to peft, each of its right type.

    ConfigError for the first that is wrong or refused; `where` names the file in it.
    """
    for key, reason in REFUSED.items():
        if given.get(key):
            raise ConfigError(f"{where}: LoraConfig.{key} cannot be used: {reason}")
    for key, right in FIXED.items():
        if given.get(key) not in (None, right):
            raise ConfigError(f"{where}: LoraConfig.{key} is {given[key]!r}, expected {right}")
    known = {key: value for key, value in given.items() if key in LoraOptions.model_fields}
    options = without_nulls(parse(LoraOptions, known, f"{where}: LoraConfig").model_dump())
    for key in _PATTERNS:
        _check_patterns(options.get(key) or {}, f"{where}: LoraConfig.{key}")
    return options


def _check_patterns(patterns: Mapping[str, Any], what: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{what}: {pattern!r} is no regular expression: {error}") from None


def without_effect(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the reason for each of the section's keys that asks for something but has no effect."""
    return {
        key: reason
        for key, reason in HARMLESS.items()
        if given.get(key) and given[key] not in SILENT.get(key, ())
    }


def target_names(written: str | list[str] | None) -> str | list[str] | None:
    """Return `target_modules` as names where it is a name, or names with commas, and no expression.

    peft takes every string but "all-linear" for an expression that must match a module's whole path.
    """
    names = r"[\w.]+(\s*,\s*[\w.]+)*"
    if isinstance(written, str) and written != "all-linear" and re.fullmatch(names, written):
        return [name.strip() for name in written.split(",")]
    return written


def check(lora: Lora) -> None:
    """Raise ConfigError for options that do not go together, as peft would once the model is loaded."""
    options = read_options(lora.options, "lora.options")
    if unknown := lora.options.keys() - LoraOptions.model_fields.keys():
        raise ConfigError(f"lora.options has the unknown key '{min(unknown)}'")
    if not lora.targets and not options.get("target_parameters"):
        raise ConfigError("LoraConfig.target_modules names nothing; 'all-linear' adapts every linear layer")
    if options.get("lora_bias") and options.get("use_dora"):
        raise ConfigError("LoraConfig has both lora_bias and use_dora: choose one")
    if options.get("lora_bias") and options.get("init_lora_weights", True) not in (True, False):
        raise ConfigError("LoraConfig.lora_bias goes with init_lora_weights true or false only")
    if options.get("layers_pattern") and options.get("layers_to_transform") is None:
        raise ConfigError("LoraConfig.layers_pattern needs layers_to_transform")
    by_name = not isinstance(lora.targets, str) or lora.targets == "all-linear"
    if options.get("layers_to_transform") is not None and not by_name:
        raise ConfigError("LoraConfig.layers_to_transform needs target_modules by name, not by an expression")
    if options.get("target_parameters") and lora.dropout:
        raise ConfigError("LoraConfig.target_parameters needs lora_dropout 0")


def unserved(lora: Lora) -> str | None:
    """Return why the adapter is not served and what to do instead, None where serving takes it."""
    reasons = lora_config.not_served(_saved(lora))
    if not reasons:
        return None
    if is_merged(lora):
        instead = "runtime merge makes a model of it that is served"
    else:
        instead = "nor can it be merged; use it with transformers and peft"
    return f"this adapter cannot be served as it is ({'; '.join(reasons)}): {instead}"


def is_merged(lora: Lora) -> bool:
    """Return whether `runtime merge` takes the adapter."""
    return not lora_config.not_merged(_saved(lora))


def _saved(lora: Lora) -> dict[str, Any]:
    """Return the options that the saved adapter has: an initialisation is undone when it is saved."""
    return {key: value for key, value in lora.options.items() if key != "init_lora_weights"}
