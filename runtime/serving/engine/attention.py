"""Attention of a step's flat tokens over their slots, also behind transformers' AttentionInterface.

Shapes: `N` flat tokens, `T` tokens of a run or chunk, `H` query heads, `K` key-value heads, `D` head dim, `S`
slots, `L` positions. Decoding sequences read their own slot up to their own length; a chunk reads its slot
causally. Does not know models. Start at `attend`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from runtime.attention import match_heads
from runtime.serving.engine.batch import Batch, SlotChunk, SlotRun
from runtime.serving.engine.kernels import AttentionKernel
from runtime.serving.engine.kv_cache import SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "slots"
"""What the model's configuration calls this attention."""


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
    kernel: AttentionKernel | None
    """What attends on a CPU."""

    @classmethod
    def of(
        cls,
        cache: SlotCache,
        index: int,
        *,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> "AttentionLayer":
        """Return the attention of layer `index` of `cache`."""
        keys, values, kernels = cache.keys[index], cache.values[index], cache.step.kernels
        kernel = None
        if kernels is not None and softcap is None:
            kernel = kernels.attention(keys, values, scaling=scaling, window=window)
        return cls(keys, values, scaling, window, softcap, kernel)


@dataclass(slots=True)
class ModuleAttention:
    """What `attention` needs beside its arguments; an attribute of each of the model's attention modules."""

    cache: SlotCache
    layer: AttentionLayer | None = None
    """Made in the first call, whose arguments are the rules of all."""


def use_slot_attention(model: "PreTrainedModel") -> None:
    """Make the attention modules of `model` call `attention`."""
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


def register(module: nn.Module, cache: SlotCache) -> None:
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return (1, N, H, D) for query (1, H, N, D); key and value were stored by `SlotCache.update` before."""
    state: ModuleAttention = module.slot_attention  # type: ignore[assignment]
    if state.layer is None:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        state.layer = AttentionLayer.of(
            state.cache, index, scaling=scaling, window=sliding_window, softcap=softcap
        )
    out = attend(query[0].transpose(0, 1), state.layer, state.cache.step.running)
    return out[None], None


def attend(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Return the attention output (N, H, D) of query (N, H, D)."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    kernel = layer.kernel
    if kernel is None:
        for run in batch.runs:
            here = slice(run.offset, run.offset + run.count * run.slot_tokens)
            out[here] = _decode(query[here], layer, run, batch)
    elif batch.decode_tokens:
        kernel.decode(
            query, out, slots=batch.slots, positions=batch.decode_positions, reads=batch.decode_reads
        )
    for chunk in batch.chunks:
        here = slice(chunk.offset, chunk.offset + chunk.count)
        if kernel is not None:
            kernel.chunk(query[here], out[here], slot=chunk.slot, start=chunk.start)
        else:
            out[here] = _prefill(query[here], layer, chunk, batch)
    return out


def _decode(query: Tensor, layer: AttentionLayer, run: SlotRun, batch: Batch) -> Tensor:
    """Attend the newest tokens of a run, (T, H, D): all heads of all its slots in two batched products."""
    tokens, heads, dim = query.shape
    kv_heads = layer.keys.shape[1]
    here = slice(run.first, run.first + run.count)
    # slots and heads lie at one stride, so these are views of the cache, not copies
    keys = layer.keys[here, :, : run.longest].flatten(0, 1)
    values = layer.values[here, :, : run.longest].flatten(0, 1)
    # side by side: all tokens and query heads that see the same keys
    grouped = (query * layer.scaling).view(run.count, run.slot_tokens, kv_heads, -1, dim).transpose(1, 2)
    scores = torch.bmm(grouped.reshape(run.count * kv_heads, -1, dim), keys.transpose(1, 2))
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    hidden = _decode_mask(run, batch, layer.window)
    if hidden is not None:
        by_token = scores.view(run.count, kv_heads, run.slot_tokens, -1, run.longest)
        by_token.masked_fill_(hidden.view(run.count, 1, run.slot_tokens, 1, -1), -torch.inf)
    out = torch.bmm(_softmax(scores), values).view(run.count, kv_heads, run.slot_tokens, -1, dim)
    return out.transpose(1, 2).reshape(tokens, heads, dim)


def _prefill(query: Tensor, layer: AttentionLayer, chunk: SlotChunk, batch: Batch) -> Tensor:
    """Attend a prompt chunk, (T, H, D), over its slot up to its own end."""
    total = chunk.start + chunk.count
    keys, values = layer.keys[chunk.slot, :, :total], layer.values[chunk.slot, :, :total]
    visible = _prefill_mask(chunk, batch, layer.window)
    if layer.softcap is None:
        states = query.transpose(0, 1)[None]
        own_keys, own_values = match_heads(states, keys[None], values[None], masked=visible is not None)
        out = scaled_dot_product_attention(
            states,
            own_keys,
            own_values,
            attn_mask=visible,
            is_causal=visible is None and chunk.count > 1,
            scale=layer.scaling,
            enable_gqa=own_keys.shape[1] != states.shape[1],
        )
        return out[0].transpose(0, 1)
    group = query.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.matmul(query.transpose(0, 1) * layer.scaling, keys.transpose(1, 2))
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if visible is None:
        visible = torch.ones(chunk.count, total, dtype=torch.bool, device=query.device).tril()
    return torch.matmul(_softmax(scores.masked_fill(~visible, -torch.inf)), values).transpose(0, 1)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in float32 whatever the type of the products."""
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _decode_mask(run: SlotRun, batch: Batch, window: int | None) -> Tensor | None:
    """Return (T, L), true outside each token's view; None when all see all positions."""
    name = (run.offset, window)
    if name not in batch.masks:
        limited = window is not None and run.longest > window
        if not run.ragged and not limited:
            batch.masks[name] = None
        else:
            position = torch.arange(run.longest, device=run.lengths.device)
            hidden = position >= run.lengths[:, None]
            if window is not None and limited:
                hidden |= position < run.lengths[:, None] - window
            batch.masks[name] = hidden
    return batch.masks[name]


def _prefill_mask(chunk: SlotChunk, batch: Batch, window: int | None) -> Tensor | None:
    """Return (T, L), true in each token's view; None when plain causal from position 0 is right."""
    name = (chunk.offset, window)
    if name not in batch.masks:
        total = chunk.start + chunk.count
        if chunk.start == 0 and (window is None or total <= window):
            batch.masks[name] = None
        else:
            token = torch.arange(chunk.start, total, device=batch.ids.device)[:, None]
            position = torch.arange(total, device=batch.ids.device)
            visible = position <= token
            if window is not None:
                visible &= position > token - window
            batch.masks[name] = visible
    return batch.masks[name]
