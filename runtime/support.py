"""Whether a model can be computed here, told by its configuration before its weights are downloaded.

Knows families and devices; reads a preset or config.json, never weights, and needs no torch. Does not know
memory (memory/) or how an engine runs a model. Start at `check_server`.
"""

import json
from typing import Any

from runtime import families, models, presets
from runtime.config import read_text
from runtime.errors import ConfigError, Failure
from runtime.hardware import Hardware, compute_dtype, has_bfloat16
from runtime.model_source import ModelSource, Quantization

_LOST = {"overflows": "activations", "serves": "gradients"}


def check_server(source: ModelSource, quantization: Quantization | None, machine: Hardware) -> None:
    """Raise ConfigError where `source` cannot be served on `machine`."""
    settings = {"model.dtype": source.dtype}
    if quantization is not None:
        settings["quantization.compute_dtype"] = quantization.compute_dtype
    how = " ".join(f"--set {name}=float32" for name in settings)
    for wanted in settings.values():
        check_dtype(source, machine, dtype=compute_dtype(machine, wanted), how=how)


def check_dtype(
    source: ModelSource, machine: Hardware, *, dtype: str, how: str, training: bool = False
) -> None:
    """Raise ConfigError where `source` would be computed in float16 and does not stay within it.

    It is refused on every device: the numbers are infinite on an A100 too, and answers and losses NaN.
    `how` are the flags that set float32.
    """
    kind = model_type(source) if dtype == "float16" else None
    if kind is None or stays_within_float16(kind, training=training):
        return
    lost = _LOST[families.find(kind).float16]
    reason = f"model {source.name}: {lost} of {kind} models exceed 65504, the largest float16"
    float32 = f"float32 ({how}), at twice the memory"
    if machine.kind == "cpu":
        raise ConfigError(f"{reason}; leave the dtype at auto")
    if has_bfloat16(machine):
        raise ConfigError(f"{reason}; leave the dtype at auto, which is bfloat16 on {machine.name}")
    major, minor = machine.capability or (0, 0)
    raise ConfigError(
        f"{reason}, and {machine.name} (compute capability {major}.{minor}) has no bfloat16; use a GPU of "
        f"compute capability 8.0 or newer, or {float32}"
    )


def stays_within_float16(model_type: str, *, training: bool) -> bool:
    """Whether float16 holds the numbers of a family, gradients included where it is for `training`."""
    known = families.find(model_type).float16
    return known == "works" or (known == "serves" and not training)


def model_type(source: ModelSource) -> str | None:
    """Return transformers' name of the configuration of `source`; None where it cannot be read now."""
    preset = presets.matching(source)
    if preset is not None:
        return preset.model_type
    try:
        config: Any = json.loads(read_text(models.config_file(source)))
    except (Failure, ValueError):  # said where the model itself is read
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None
