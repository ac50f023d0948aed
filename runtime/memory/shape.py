"""The shape of a model, and what follows from it in numbers of weights: from a preset or a config.json.

Reads JSON; needs neither torch nor the weights. Which modules a layer has stands in families.py;
architectures whose layers differ are counted (counting.py). Does not know bytes, jobs or devices. Start at
`of`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime import families, model_files, models, presets
from runtime.errors import ConfigError
from runtime.families import Family
from runtime.memory import counting
from runtime.memory.counting import CacheSize, Counts
from runtime.model_source import ModelSource
from runtime.presets import Dimensions

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number, by type."""
_STORED_BYTES = {"fp8": 1.05, "mxfp4": 0.55, "awq": 0.6, "gptq": 0.6, "compressed-tensors": 0.6}
"""Bytes of a weight in files of each method, scales and what stays whole counted in: an estimate."""
_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size", "ffn_dim")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear module of a decoder layer, which bitsandbytes quantises and LoRA adapts."""

    path: str
    """Below the layer: "self_attn.q_proj"."""
    inputs: int
    outputs: int
    copies: int
    """How many of it the model has: one a layer, where layers are alike."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """What a memory plan needs to know of a model."""

    name: str
    model_type: str
    """transformers' name of the configuration."""
    dimensions: Dimensions
    context_tokens: int
    """Longest sequence the model was made for."""
    stored_bytes: int
    """Size of its weights' files."""
    quantized: str | None = None
    """Method by which the files are quantised already; None for whole weights."""
    files_known: bool = True
    """`stored_bytes` is the size of files, not what follows from the number of weights."""
    counts: Counts | None = None
    """Counted by transformers, for architectures whose layers are not alike."""

    @property
    def family(self) -> Family:
        """What is known of its model_type."""
        return families.find(self.model_type)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The kinds of linear modules under the names that the architecture gives them."""
        if self.counts is not None:
            return tuple(Linear(it.path, it.inputs, it.outputs, it.copies) for it in self.counts.linears)
        size = self.dimensions
        hidden, wide = size.hidden, size.intermediate
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        widths = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
        widths["o_proj"] = (queries, hidden)
        if size.experts == 1:  # experts are one tensor per layer, not linear modules
            widths |= {"gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}
        modules: dict[str, Linear] = {}
        for name, path in self.family.projections.items():
            if name in widths:
                inputs, outputs = widths[name]
                fused = modules[path].outputs if path in modules else 0
                modules[path] = Linear(path, inputs, fused + outputs, size.layers)
        return tuple(modules.values())

    @property
    def linear_parameters(self) -> int:
        """Weights that quantisation reaches: the linear modules of all layers, without the head."""
        return sum(linear.copies * linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All weights."""
        if self.counts is not None:
            return self.counts.parameters
        size = self.dimensions
        return size.parameters + size.hidden * (2 * size.layers + 1)  # norms

    @property
    def other_parameters(self) -> int:
        """Weights that stay in the compute type: embedding, head, norms, experts."""
        return max(0, self.parameters - self.linear_parameters)

    @property
    def cache(self) -> CacheSize:
        """What a sequence keeps while it is generated."""
        size = self.dimensions
        if self.counts is not None and self.counts.cache is not None:
            return self.counts.cache
        each = 2 * size.kv_heads * size.head_dim
        whole = size.full_attention_layers
        if self.counts is not None or size.sliding_window is None or whole is None:
            return CacheSize(token=each * size.layers)
        windowed = each * (size.layers - whole)
        return CacheSize(token=each * whole, window_token=windowed, window=size.sliding_window)

    def shard(self, world: int, *, embeddings: bool = False) -> "Shape":
        """Return the shape of what each of `world` ranks holds under tensor parallelism.

        Heads and inner features are divided, key-value heads at most to one; the rest is whole on each, but
        for the `embeddings` where an engine divides them too. What is counted is divided evenly.
        """
        size, counts = self.dimensions, self.counts
        divided = {"heads": size.heads, "kv_heads": size.kv_heads, "intermediate": size.intermediate}
        divided |= {"vocabulary": size.vocabulary} if embeddings else {}
        part = size.model_copy(update={name: max(1, count // world) for name, count in divided.items()})
        if counts is not None:
            counts = counts.shard(world)
        stored = self.stored_bytes // world
        return replace(self, dimensions=part, counts=counts, stored_bytes=stored)

    @property
    def modules(self) -> dict[str, Linear]:
        """The linear modules by their whole paths; where layers are not alike, as if the first had them."""
        layers = self.family.layers
        return {f"{layers}.{n}.{each.path}": each for each in self.linears for n in range(each.copies)}

    def adapted(self, targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
        """Return the linear modules of a layer that LoRA `targets` reach, by peft's rules of matching."""
        if targets == "all-linear":
            return self.linears
        if isinstance(targets, str):
            pattern = re.compile(targets)
            return tuple(it for it in self.linears if pattern.fullmatch(f"model.layers.0.{it.path}"))
        return tuple(it for it in self.linears if it.name in {name.rpartition(".")[2] for name in targets})


def of(source: ModelSource) -> Shape:
    """Return the shape of `source`: of its preset, else of its config.json.

    The file is read, and fetched when it is not local, only for a model without a preset.
    """
    preset = presets.matching(source)
    if preset is None:
        return read(models.config_file(source), name=source.name)
    counts = None if preset.dimensions else counting.count(preset.configuration or {})
    if counts is not None:
        counts = counts.model_copy(update={"parameters": counts.parameters + preset.other_parameters})
    return Shape(
        name=preset.name,
        model_type=preset.model_type,
        dimensions=preset.dimensions or _counted(counts).dimensions,
        context_tokens=preset.context_tokens,
        stored_bytes=int(preset.download_gib * 2**30),
        quantized=preset.quantized,
        counts=counts,
    )


def read(file: Path, *, name: str) -> Shape:
    """Return the shape of the model that the config.json in `file` describes; ConfigError when it is of none.

    What a family's record says to be alike follows from a few numbers; anything else is built by transformers
    without storage and counted, in a process of its own.
    """
    try:
        config = model_files.read_config(file)
        kind = config["model_type"]
        plain = isinstance(kind, str) and families.find(kind).alike and "text_config" not in config
        text = config.get("text_config") or config
        size = dimensions(config) if plain else None
        context = int(text.get("max_position_embeddings") or text.get("n_positions") or 2048)
        dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32")
        quantized = (config.get("quantization_config") or {}).get("quant_method")
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{file}: no shape of a decoder-only model in it ({error!r})") from None
    try:
        counts = None if size else counting.count(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    shape = Shape(name, kind, size or _counted(counts).dimensions, context, 0, quantized, False, counts)
    weights = sum(path.stat().st_size for path in file.parent.glob("*.safetensors"))
    stored = weights or int(shape.parameters * _STORED_BYTES.get(str(quantized), BYTES.get(dtype, 2)))
    return replace(shape, stored_bytes=stored, files_known=bool(weights))


def _counted(counts: Counts | None) -> Counts:
    assert counts is not None, "a shape has dimensions or is counted"  # noqa: S101
    return counts


def dimensions(text: Mapping[str, Any]) -> Dimensions:
    """Return what the configuration of a text model states; KeyError or TypeError for what it lacks."""
    family = families.find(str(text.get("model_type")))
    hidden, heads = int(text["hidden_size"]), int(_first(text, "num_attention_heads", "n_head"))
    windows = layer_windows(text)
    window = next(filter(None, windows), None)
    return Dimensions(
        layers=len(windows),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(text, heads, family),
        head_dim=int(text.get("head_dim") or hidden // heads),
        intermediate=next((int(text[name]) for name in _INTERMEDIATE if text.get(name)), 4 * hidden),
        vocabulary=int(text["vocab_size"]),
        tied_embeddings=bool(text.get("tie_word_embeddings", family.tied_by_default)),
        gated_mlp=family.gated,
        sliding_window=window,
        full_attention_layers=windows.count(None) if window else None,
    )


def layer_windows(text: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return how many positions a token of each layer sees, itself included; None for all.

    What the configuration of a text model does not say is what transformers' class of it would.
    """
    family, layers = (
        families.find(str(text.get("model_type"))),
        int(_first(text, "num_hidden_layers", "n_layer")),
    )
    window = text.get("sliding_window")
    if not window or not text.get("use_sliding_window", not family.windows_asked_for):
        return (None,) * layers
    every = text.get("sliding_window_pattern") or family.full_attention_every
    first = int(text.get("max_window_layers", 28)) if family.windows_asked_for else 0
    kinds = text.get("layer_types") or [
        "sliding_attention" if layer >= first and (not every or (layer + 1) % every) else "full_attention"
        for layer in range(layers)
    ]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _kv_heads(text: Mapping[str, Any], heads: int, family: Family) -> int:
    if not family.multi_query:
        return int(text.get("num_key_value_heads") or heads)
    if text.get("new_decoder_architecture"):
        return int(text.get("num_kv_heads") or heads)
    return 1 if text.get("multi_query", True) else heads


def _first(text: Mapping[str, Any], *names: str) -> Any:
    return next((text[name] for name in names if text.get(name) is not None), None) or text[names[0]]
