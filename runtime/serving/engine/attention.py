"""Attention of a step's flat tokens over the slots of their rows, behind transformers' AttentionInterface.

Shapes: `N` flat tokens, `H` query heads, `K` key-value heads, `G` = H / K, `D` head dim, `L` positions.
Decoding rows read their own slot up to their own length; a chunk reads its slot causally. Does not know
models. Start at `attend`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from runtime.serving.engine.batch import Batch, SlotChunk, SlotRun
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_cache import SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "rows"
"""What the model's configuration calls this attention."""

_caches: dict[int, SlotCache] = {}
"""Cache by id of the model's attention modules' configuration: how the function finds its engine."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one layer's attention reads, and its rules."""

    keys: Tensor
    """(S, K, L, D)"""
    values: Tensor
    scaling: float
    window: int | None
    """A token sees this many positions, itself included; None sees all."""
    softcap: float | None
    """Gemma 2: scores are squeezed into plus and minus this."""
    kernels: Kernels | None
    """What attends on a CPU."""


def use_slot_attention(model: "PreTrainedModel") -> None:
    """Make the attention modules of `model` call `attention`."""
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


def register(config: object, cache: SlotCache) -> None:
    """Let the modules built from `config` attend over `cache`."""
    _caches[id(config)] = cache


def unregister(config: object) -> None:
    """Forget the cache of `config`."""
    _caches.pop(id(config), None)


def attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return (1, N, H, D) for query (1, H, N, D); key and value were stored by `SlotCache.update` before."""
    cache = _caches[id(module.config)]
    index = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = cache.keys[index], cache.values[index]
    layer = AttentionLayer(keys, values, scaling, sliding_window, softcap, cache.kernels)
    out = attend(query[0].transpose(0, 1), layer, cache.running)
    return out[None], None


def attend(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Return the attention output (N, H, D) of query (N, H, D)."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    native = layer.kernels if layer.softcap is None else None
    if native is not None and batch.decodes:
        native.attend(query, layer, batch, out)
    for run in batch.runs if native is None else ():
        here = slice(run.offset, run.offset + run.count * run.queries)
        out[here] = _decode(query[here], layer, run, batch)
    for piece in batch.chunks:
        here = slice(piece.offset, piece.offset + piece.count)
        if native is not None:
            native.attend_chunk(query[here], layer, piece, out[here])
        else:
            out[here] = _prefill(query[here], layer, piece, batch)
    return out


def _decode(query: Tensor, layer: AttentionLayer, run: SlotRun, batch: Batch) -> Tensor:
    """The newest tokens of each row, (T, H, D): all heads of all rows of the run in two batched products."""
    tokens, heads, dim = query.shape
    groups = layer.keys.shape[1]
    here = slice(run.first, run.first + run.count)
    # slots and heads lie at one stride, so these are views of the cache, not copies
    keys = layer.keys[here, :, : run.longest].flatten(0, 1)
    values = layer.values[here, :, : run.longest].flatten(0, 1)
    # beside one another: all tokens and query heads that see the same keys
    beside = (query * layer.scaling).view(run.count, run.queries, groups, -1, dim).transpose(1, 2)
    scores = torch.bmm(beside.reshape(run.count * groups, -1, dim), keys.transpose(1, 2))
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    hidden = _decode_mask(run, batch, layer.window)
    if hidden is not None:
        own = scores.view(run.count, groups, run.queries, -1, run.longest)
        own.masked_fill_(hidden.view(run.count, 1, run.queries, 1, -1), -torch.inf)
    out = torch.bmm(_softmax(scores), values).view(run.count, groups, run.queries, -1, dim)
    return out.transpose(1, 2).reshape(tokens, heads, dim)


def _prefill(query: Tensor, layer: AttentionLayer, piece: SlotChunk, batch: Batch) -> Tensor:
    """A prompt chunk, (T, H, D), over its slot up to its own end."""
    total = piece.start + piece.count
    keys, values = layer.keys[piece.slot, :, :total], layer.values[piece.slot, :, :total]
    seen = _prefill_mask(piece, batch, layer.window)
    if layer.softcap is None:
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=seen,
            is_causal=seen is None and piece.count > 1,
            scale=layer.scaling,
            enable_gqa=keys.shape[0] != query.shape[1],
        )
        return out[0].transpose(0, 1)
    group = query.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.matmul(query.transpose(0, 1) * layer.scaling, keys.transpose(1, 2))
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if seen is None:
        seen = torch.ones(piece.count, total, dtype=torch.bool, device=query.device).tril()
    return torch.matmul(_softmax(scores.masked_fill(~seen, -torch.inf)), values).transpose(0, 1)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in float32 whatever the type of the products."""
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _decode_mask(run: SlotRun, batch: Batch, window: int | None) -> Tensor | None:
    """Return (T, L), true outside each token's view; None when all see all positions."""
    name = (run.offset, window)
    if name not in batch.masks:
        cut = window is not None and run.longest > window
        if not run.ragged and not cut:
            batch.masks[name] = None
        else:
            place = torch.arange(run.longest, device=run.lengths.device)
            hidden = place >= run.lengths[:, None]
            if window is not None and cut:
                hidden |= place < run.lengths[:, None] - window
            batch.masks[name] = hidden
    return batch.masks[name]


def _prefill_mask(piece: SlotChunk, batch: Batch, window: int | None) -> Tensor | None:
    """Return (T, L), true at what is seen; None when plain causal from position 0 is right."""
    name = (piece.offset, window)
    if name not in batch.masks:
        total = piece.start + piece.count
        if piece.start == 0 and (window is None or total <= window):
            batch.masks[name] = None
        else:
            own = torch.arange(piece.start, total, device=batch.ids.device)[:, None]
            place = torch.arange(total, device=batch.ids.device)
            seen = place <= own
            if window is not None:
                seen &= place > own - window
            batch.masks[name] = seen
    return batch.masks[name]
