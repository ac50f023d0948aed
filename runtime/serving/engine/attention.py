"""Attention of a step's flat tokens over their ranges, also behind transformers' AttentionInterface.

Shapes: `N` flat tokens, `T` tokens of a chunk, `H` query heads, `K` key-value heads, `D` head dim, `P`
positions of an arena, `L` of a range. A decoding sequence reads its range, a chunk its own causally. Does not
know models. Start at `attend`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from runtime.serving.engine.batch import Batch, Chunk, KeyRanges
from runtime.serving.engine.kv_pool import KvPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "slots"
"""What the model's configuration calls this attention."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one layer's attention reads, and its rules."""

    keys: Tensor
    """(P, K, D)"""
    values: Tensor
    kind: int
    """Of layer: which of the batch's ranges are its own."""
    scaling: float
    window: int | None
    """A token sees this many positions, itself included; None sees all."""
    softcap: float | None
    """Gemma 2: scores are squeezed into plus and minus this."""

    @classmethod
    def of(
        cls, cache: KvPool, index: int, *, scaling: float, softcap: float | None = None
    ) -> "AttentionLayer":
        """Return the attention of layer `index` of `cache`."""
        kind = cache.kinds.of_layer[index]
        window = cache.kinds.kinds[kind].window
        return cls(cache.keys[index], cache.values[index], kind, scaling, window, softcap)


@dataclass(slots=True)
class ModuleAttention:
    """What `attention` needs beside its arguments; an attribute of each of the model's attention modules."""

    cache: KvPool
    layer: AttentionLayer | None = None
    """Made in the first call, whose arguments are the rules of all."""


def use_slot_attention(model: "PreTrainedModel") -> None:
    """Make the attention modules of `model` call `attention`."""
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


def register(module: nn.Module, cache: KvPool) -> None:
    """Let an attention module of a model attend over `cache`."""
    module.slot_attention = ModuleAttention(cache)  # type: ignore[assignment]


def attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return (1, N, H, D) for query (1, H, N, D); key and value were stored by `KvPool.update` before."""
    state: ModuleAttention = module.slot_attention  # type: ignore[assignment]
    if state.layer is None:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        state.layer = AttentionLayer.of(state.cache, index, scaling=scaling, softcap=softcap)
    out = attend(query[0].transpose(0, 1), state.layer, state.cache.step.running)
    return out[None], None


def attend(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Return the attention output (N, H, D) of query (N, H, D), in plain operations of torch."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    ranges, decodes = batch.ranges[layer.kind], batch.decode_tokens
    if decodes:
        out[:decodes] = _decode(query[:decodes], layer, ranges)
    for chunk in batch.chunks:
        here = slice(chunk.offset, chunk.offset + chunk.count)
        out[here] = _chunk(query[here], layer, chunk)
    return out


def _decode(query: Tensor, layer: AttentionLayer, ranges: KeyRanges) -> Tensor:
    """Attend one token a sequence, (R, H, D), over the whole of its range."""
    count = len(query)
    place = torch.arange(ranges.longest_decode, device=query.device)
    hidden = place >= ranges.lengths[:count, None]
    positions = (ranges.starts[:count, None] + place).masked_fill(hidden, len(layer.keys) - 1)
    keys, values = layer.keys[positions], layer.values[positions]  # (R, L, K, D)
    visible = ~hidden[:, None]  # (R, 1, L)
    return torch.cat(
        [_plain(query[row : row + 1], keys[row], values[row], visible[row], layer) for row in range(count)]
    )


def _chunk(query: Tensor, layer: AttentionLayer, chunk: Chunk) -> Tensor:
    """Attend a chunk, (T, H, D), causally over its range."""
    start, length = chunk.ranges[layer.kind]
    token = torch.arange(length - chunk.count, length, device=query.device)[:, None]
    position = torch.arange(length, device=query.device)
    visible = position <= token
    if layer.window is not None:
        visible &= position > token - layer.window
    here = slice(start, start + length)
    return _plain(query, layer.keys[here], layer.values[here], visible, layer)


def _plain(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, layer: AttentionLayer) -> Tensor:
    """Attend query (T, H, D) over keys and values (L, K, D) where `visible` (T, L)."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.transpose(0, 1).repeat_interleave(group, 0) for each in (keys, values))
    scores = torch.matmul(query.transpose(0, 1) * layer.scaling, keys.transpose(1, 2))
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return torch.matmul(weights, values).transpose(0, 1)
