"""The shape of a model, and what follows from it in numbers of weights: from a preset or a config.json.

Reads JSON; needs neither torch nor the weights. Which modules a layer has stands in families.py. Does not
know bytes, jobs or devices. Start at `of`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import families, models, presets
from runtime.config import read_text
from runtime.errors import ConfigError
from runtime.families import Family
from runtime.model_source import ModelSource
from runtime.presets import Dimensions

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number, by type."""
_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size", "ffn_dim")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear module of a decoder layer, which bitsandbytes quantises and LoRA adapts."""

    path: str
    """Below the layer: "self_attn.q_proj"."""
    inputs: int
    outputs: int

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

    @property
    def family(self) -> Family:
        """What is known of its model_type."""
        return families.find(self.model_type)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear modules of one layer under the names that the architecture gives them."""
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
                modules[path] = Linear(path, inputs, fused + outputs)
        return tuple(modules.values())

    @property
    def linear_parameters(self) -> int:
        """Weights that quantisation reaches: the linear modules of all layers, without the head."""
        return self.dimensions.layers * sum(linear.parameters for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """Weights that stay in the compute type: embedding, head, norms, experts."""
        size = self.dimensions
        norms = size.hidden * (2 * size.layers + 1)
        return max(0, size.parameters + norms - self.linear_parameters)

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
    if preset is not None:
        stored = int(preset.download_gib * 2**30)
        quantized = preset.stored_as if preset.stored_as not in BYTES else None
        return Shape(
            preset.name, preset.model_type, preset.dimensions, preset.context_tokens, stored, quantized
        )
    return read(models.config_file(source), name=source.name)


def read(file: Path, *, name: str) -> Shape:
    """Return the shape that the config.json in `file` states; ConfigError when it states none."""
    try:
        config = json.loads(read_text(file))
        text = config.get("text_config") or config
        size = dimensions(text)
        kind = str(text.get("model_type") or config.get("model_type"))
        context = int(text.get("max_position_embeddings") or text.get("n_positions") or 2048)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: no shape of a decoder-only model in it ({error!r})") from None
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32")
    weights = sum(path.stat().st_size for path in file.parent.glob("*.safetensors"))
    stored = weights or size.parameters * BYTES.get(dtype, 2)
    quantized = (config.get("quantization_config") or {}).get("quant_method")
    return Shape(name, kind, size, context, stored, quantized)


def dimensions(text: Mapping[str, Any]) -> Dimensions:
    """Return what the configuration of a text model states; KeyError or TypeError for what it lacks."""
    family = families.find(str(text.get("model_type")))
    hidden, heads = int(text["hidden_size"]), int(_first(text, "num_attention_heads", "n_head"))
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return Dimensions(
        layers=int(_first(text, "num_hidden_layers", "n_layer")),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(text, heads, family),
        head_dim=int(text.get("head_dim") or hidden // heads),
        intermediate=next((int(text[name]) for name in _INTERMEDIATE if text.get(name)), 4 * hidden),
        vocabulary=int(text["vocab_size"]),
        tied_embeddings=bool(text.get("tie_word_embeddings", family.tied_by_default)),
        gated_mlp=family.gated,
        experts=int(text.get("num_local_experts") or text.get("num_experts") or 1),
        active_experts=int(text.get("num_experts_per_tok") or 1),
        sliding_window=int(window) if window else None,
    )


def _kv_heads(text: Mapping[str, Any], heads: int, family: Family) -> int:
    if not family.multi_query:
        return int(text.get("num_key_value_heads") or heads)
    if text.get("new_decoder_architecture"):
        return int(text.get("num_kv_heads") or heads)
    return 1 if text.get("multi_query", True) else heads


def _first(text: Mapping[str, Any], *names: str) -> Any:
    return next((text[name] for name in names if text.get(name) is not None), None) or text[names[0]]
