"""Attention of a step's flat tokens over their ranges, also behind transformers' AttentionInterface.

Shapes: `N` flat tokens, `H` query heads, `K` key-value heads, `D` head dim, `P` positions of an arena. How
it is computed is in attention_forms.py. Does not know models. Start at `attend`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import AttentionInterface

from runtime.serving.engine.attention_forms import FORMS, AttentionLayer, of_layer
from runtime.serving.engine.batch import Batch
from runtime.serving.engine.kv_pool import KvPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ranges"
"""What the model's configuration calls this attention."""


@dataclass(slots=True)
class ModuleAttention:
    """What `attention` needs beside its arguments; an attribute of each of the model's attention modules."""

    cache: KvPool
    layer: AttentionLayer | None = None
    """Made in the first call, whose arguments are the rules of all."""


def use_range_attention(model: "PreTrainedModel") -> None:
    """Make the attention modules of `model` call `attention`."""
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


def register(module: nn.Module, cache: KvPool) -> None:
    """Let an attention module of a model attend over `cache`."""
    module.range_attention = ModuleAttention(cache)  # type: ignore[assignment]


def attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return (1, N, H, D) for query (1, H, N, D); key and value were stored by `KvPool.update` before.

    `s_aux` (H,) are sinks. The window is that of the layer's kind.
    """
    state: ModuleAttention = module.range_attention  # type: ignore[assignment]
    if state.layer is None:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        state.layer = layer_of(state.cache, index, scaling=scaling, softcap=softcap, sinks=s_aux)
    out = attend(query[0].transpose(0, 1), state.layer, state.cache.step.running)
    return out[None], None


def layer_of(
    cache: KvPool, index: int, *, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> AttentionLayer:
    """Return the attention of layer `index` of `cache`."""
    keys, values, kind = cache.keys[index], cache.values[index], cache.kinds.of_layer[index]
    window, kernels = cache.kinds.kinds[kind].window, cache.step.kernels
    form = of_layer(cache.step.form, softcap=softcap, sinks=sinks)
    kernel = None
    if form == "compiled" and kernels is not None:
        kernel = kernels.attention(keys, values, scaling=scaling, window=window)
    return AttentionLayer(keys, values, kind, scaling, window, softcap, sinks, form, kernel)


def attend(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Return the attention output (N, H, D) of query (N, H, D)."""
    return FORMS[layer.form](query, layer, batch)
