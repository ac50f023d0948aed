"""Prepares a transformers model for flat tokens: own attention, merged projections, layers with adapters.

The module tree stays transformers'; attention, MLP and norm modules of families that are alike are replaced
by those of layers.py. Does not know requests. Start at `prepare`.
"""

from typing import TYPE_CHECKING

from torch import nn

from runtime import families
from runtime.serving.engine import rope
from runtime.serving.engine.attention import register, use_range_attention
from runtime.serving.engine.kv_pool import KvPool
from runtime.serving.engine.layers import FalconAttention, FusedAttention, FusedMlp, LayerFactory, RMSNorm
from runtime.serving.engine.lora import LoraLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refusal(model: "PreTrainedModel") -> str | None:
    """Return why the batching engine cannot drive `model`, or None when it can."""
    config = model.config.get_text_config()
    if families.find(model.config.model_type).engine is None:
        return f"architecture '{model.config.model_type}' is not one it knows"
    if getattr(config, "alibi", False):
        return "ALiBi positions"
    return rope.refusal(config)


def prepare(model: "PreTrainedModel", cache: KvPool, layers: LayerFactory) -> None:
    """Change `model` in place to run flat tokens over `cache`, its linear layers made by `layers`."""
    family = families.find(model.config.model_type)
    replaced = family.own_layers or family.engine == "falcon"  # whose class takes no other attention function
    if not replaced:
        use_range_attention(model)
    for name, module in list(model.named_modules()):
        if family.engine == "falcon" and hasattr(module, "query_key_value"):
            _replace(model, name, FalconAttention(module, cache))
        elif family.own_layers and hasattr(module, "o_proj"):
            _replace(model, name, FusedAttention(name, module, cache, layers))
        elif family.own_layers and hasattr(module, "down_proj") and hasattr(module, "gate_proj"):
            _replace(model, name, FusedMlp(name, module, layers))
        elif family.engine == "decoder" and hasattr(module, "variance_epsilon"):
            _replace(model, name, RMSNorm(module.weight, module.variance_epsilon, cache.step.kernels))
        elif not replaced and hasattr(module, "layer_idx") and hasattr(module, "config"):
            register(module, cache)
    for name, module in list(model.named_modules()):
        if _is_linear(module) and module is not model.get_output_embeddings() and not _inside(model, name):
            _replace(model, name, layers.linear(name, module))
    _choose_rope_by_sequence(model, cache)
    head = model.get_output_embeddings()
    if head is not None:
        model.set_output_embeddings(layers.head(head))
    for parameter in model.parameters():
        if parameter.device.type == "cpu":  # may be a view of the weights' file, and the last one keeps it
            parameter.data = parameter.data.clone()


def _choose_rope_by_sequence(model: "PreTrainedModel", cache: KvPool) -> None:
    for name, module in list(model.named_modules()):
        if getattr(module, "rope_type", None) == "longrope":
            _replace(model, name, rope.LongRope(module, cache.step))
        elif getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"  # else the longest position goes to the host in each step; see KNOWN


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "weight") and not isinstance(module, LoraLinear)


def _inside(model: nn.Module, name: str) -> bool:
    """Whether the module at `name` is already inside a `LoraLinear`."""
    ancestors = name.split(".")
    return any(
        isinstance(model.get_submodule(".".join(ancestors[:depth])), LoraLinear)
        for depth in range(1, len(ancestors))
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
