"""What can be done with a model here, told by its configuration before its weights are downloaded.

Knows families, stored types and devices; reads a preset or config.json, never weights, and needs no torch but
for `check_architecture`. Does not know memory (memory/) or how an engine runs a model. Start at
`check_server` and `check_tuner`.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from runtime import families, models, presets
from runtime.config import read_text
from runtime.errors import ConfigError, Failure
from runtime.hardware import Hardware, compute_dtype, has_bfloat16
from runtime.model_source import ModelSource, Quantization
from runtime.presets import Preset

_LOST = {"overflows": "activations", "serves": "gradients"}
_READ_WITH = {
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "transformers",
    "fp8": "transformers",
    "awq": "gptqmodel",
    "gptq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "hqq": "hqq",
}
"""Method of quantised files -> the package that transformers reads them with."""
_FP8_KERNELS_FROM = (8, 9)
"""Compute capability from which transformers computes in FP8, by kernels that are not in the image; below it,
and on a CPU, it dequantises."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a configuration says of what runs it."""

    model_type: str
    quantized: str | None
    """Method by which the files are quantised."""
    own_code: bool = False
    """The repository brings Python code for its architecture."""


def check_server(
    source: ModelSource,
    quantization: Quantization | None,
    machine: Hardware,
    *,
    engine: Literal["own", "vllm"] = "own",
) -> None:
    """Raise ConfigError where `source` cannot be served on `machine` by that engine."""
    if engine == "own":
        _check_own_engine(source, quantization, machine)
    settings = {"model.dtype": source.dtype}
    if quantization is not None:
        settings["quantization.compute_dtype"] = quantization.compute_dtype
    how = " ".join(f"--set {name}=float32" for name in settings)
    for wanted in settings.values():
        check_dtype(source, machine, dtype=compute_dtype(machine, wanted), how=how)


def check_tuner(source: ModelSource, machine: Hardware, *, dtype: str, how: str) -> None:
    """Raise ConfigError where `source` cannot be tuned on `machine`; `how` are the flags that set float32."""
    found = described(source)
    if found is not None and not _loads(found, source):
        raise ConfigError(f"model {source.name}: {_not_loaded(found)}, so it cannot be tuned")
    if found is not None and found.quantized not in (None, "bitsandbytes"):
        raise ConfigError(
            f"model {source.name}: its files are quantised already ({found.quantized}), and an adapter needs "
            "the whole weights, which qlora quantises itself; tune the model that they were made from"
        )
    check_dtype(source, machine, dtype=dtype, how=how, training=True)


def check_architecture(source: ModelSource) -> None:
    """Raise ConfigError where transformers has no class for `source`; imports transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = described(source)
    if found is None or (found.own_code and source.trust_remote_code):
        return
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        code = ", or --set model.trust_remote_code=true runs the code of its repository" * found.own_code
        raise ConfigError(f"model {source.name}: {_not_loaded(found)}; --engine vllm may serve it{code}")


def serving_of(preset: Preset) -> tuple[str, str]:
    """Return how `preset` is served, and why not otherwise ("" where nothing is to be said)."""
    found = Described(preset.model_type, preset.quantized)
    if not _loads(found, preset.source()):
        return "vLLM only", _not_loaded(found)
    missing = _missing(found)
    if missing is not None:
        return "vLLM only", f"files quantised as {found.quantized} need the package {missing}"
    if families.find(preset.model_type).engine is None:
        return "one at a time", f"the batching engine does not know architecture '{preset.model_type}'"
    return "batched", ""


def _check_own_engine(source: ModelSource, quantization: Quantization | None, machine: Hardware) -> None:
    found = described(source)
    if found is None:
        return
    if not _loads(found, source):
        raise ConfigError(f"model {source.name}: {_not_loaded(found)}; --engine vllm may serve it")
    if found.quantized is None:
        return
    stored = f"model {source.name}: its files are quantised as {found.quantized}"
    missing = _missing(found)
    if missing is not None:
        raise ConfigError(f"{stored}, which needs the package {missing}, not installed here; {_OTHERWISE}")
    if quantization is not None:
        raise ConfigError(f"{stored} already; leave the quantisation out (--quantize none)")
    by_kernels = found.quantized == "fp8" and (machine.capability or (0, 0)) >= _FP8_KERNELS_FROM
    if by_kernels and (find_spec("kernels") is None or find_spec("triton") is None):
        raise ConfigError(
            f"{stored}, which {machine.name} computes with triton and the package kernels, not both "
            f"installed here; {_OTHERWISE}"
        )


_OTHERWISE = "--engine vllm reads them, or take the model with whole weights"


def _loads(found: Described, source: ModelSource) -> bool:
    return families.find(found.model_type).causal or (found.own_code and source.trust_remote_code)


def _not_loaded(found: Described) -> str:
    return f"transformers loads no '{found.model_type}' as a causal language model"


def _missing(found: Described) -> str | None:
    """Return the package that reading the files needs and that is not installed."""
    if found.quantized is None:
        return None
    package = _READ_WITH.get(found.quantized, f"for {found.quantized}")
    try:
        installed = package in _READ_WITH.values() and find_spec(package) is not None
    except ModuleNotFoundError:  # a package above it
        installed = False
    return None if installed else package


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
    found = described(source)
    return found.model_type if found else None


def described(source: ModelSource) -> Described | None:
    """Return what the preset or config.json of `source` says; None where it cannot be read now."""
    preset = presets.matching(source)
    if preset is not None:
        return Described(preset.model_type, preset.quantized)
    try:
        config: Any = json.loads(read_text(models.config_file(source)))
        kind, quantized = config["model_type"], (config.get("quantization_config") or {}).get("quant_method")
        own_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    except (Failure, AttributeError, KeyError, TypeError, ValueError):  # said where the model itself is read
        return None
    return Described(kind, quantized, own_code) if isinstance(kind, str) else None
