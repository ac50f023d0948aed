"""Attention over ranges of an arena in four forms: two kernels of torch for GPUs, ours for CPUs, plain torch.

Shapes: `N` flat tokens, `R` of decoding sequences, `T` of chunks, `B` sequences, `H` query heads, `K`
key-value heads, `G` query heads of each, `D` head dim, `P` positions of an arena, `L` of a range. The GPU
forms read no number of the device and copy no key. Does not know models. Start at `choose` and `FORMS`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runtime.attention import FLASH_CAPABILITY, FLASH_DIM, HEAD_BYTES, varlen_kernel
from runtime.serving.engine.batch import Batch, Chunk, Form
from runtime.serving.engine.kernels import AttentionKernel, Kernels

log = logging.getLogger(__name__)

FULL = -1
"""FlashAttention's window without a bound on that side."""
CAUSAL_FROM_BOTTOM_RIGHT = 2
"""The efficient kernel's mask in which the last query sees the last key."""
PIECE = 1 << 14
"""Positions of keys that the plain form gathers at a time."""
SAID = {
    "varlen": "FlashAttention 2",
    "efficient": "the memory-efficient kernel",
    "compiled": "compiled kernels",
    "plain": "plain torch operations",
}


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
    softcap: float | None = None
    """Gemma 2: scores are squeezed into plus and minus this."""
    sinks: Tensor | None = None
    """(H,) gpt-oss: a score beside those of the keys that takes its share of the weights and has no value."""
    form: Form = "plain"
    kernel: AttentionKernel | None = None
    """Of the compiled form."""


def choose(
    config: Any,
    dtype: torch.dtype,
    *,
    dims: tuple[int, ...],
    capability: tuple[int, int] | None,
    kernels: Kernels | None,
) -> Form:
    """Return the form of a model's attention and log it.

    `dims` are the head dims of its layers, `capability` the GPU's compute capability, None on a CPU.
    """
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    form, why = _choose(dtype, dims, capability=capability, kernels=kernels, capped=softcap is not None)
    log.info("Attention by %s%s", SAID[form], why)
    return form


def _choose(
    dtype: torch.dtype,
    dims: tuple[int, ...],
    *,
    capability: tuple[int, int] | None,
    kernels: Kernels | None,
    capped: bool,
) -> tuple[Form, str]:
    """Return the form, and what to say of why it is not a faster one."""
    if capped:
        return "plain", ": no kernel squeezes scores as this model does"
    if capability is None:
        return ("compiled", "") if kernels is not None else ("plain", "")
    number = str(dtype).removeprefix("torch.")
    kernels_of = {dim: varlen_kernel(dtype, dim, capability=capability) for dim in dims}
    if refused := [dim for dim, kernel in kernels_of.items() if kernel is None]:
        if refused[0] * dtype.itemsize % HEAD_BYTES:
            return "plain", f": a head of {refused[0]} numbers is not a multiple of {HEAD_BYTES} bytes"
        return "plain", f": no kernel of this GPU computes {number}"
    if "efficient" not in kernels_of.values():
        return "varlen", ""
    if capability < FLASH_CAPABILITY:
        return "efficient", ""
    if max(dims) > FLASH_DIM:
        return "efficient", f": FlashAttention takes heads up to {FLASH_DIM}, not {max(dims)}"
    return "efficient", f": FlashAttention takes two-byte numbers, not {number}"


def of_layer(form: Form, *, softcap: float | None, sinks: Tensor | None) -> Form:
    """Return the form of one layer of a model that has `form`."""
    return "plain" if softcap is not None or (sinks is not None and form != "varlen") else form


@dataclass(frozen=True, slots=True)
class _Sequences:
    """The decoding sequences of a step, or those with chunks, as the GPU kernels take them."""

    query_starts: Tensor
    """(B + 1,) int32: where the queries of each begin, and their number."""
    key_starts: Tensor
    """(B + 1,) int32: where the keys of each begin; the last is not read."""
    lengths: Tensor
    """(B,) int32 keys of each."""
    longest_query: int
    longest_key: int
    causal: bool
    """Whether the last query of each sees all its keys, and each one before it one less; else all see all."""


def _decoding(batch: Batch, kind: int, *, rows: int = 1) -> _Sequences:
    """Return the decoding sequences, each with so many rows of queries."""
    name, count = ("query starts", rows), batch.decode_tokens
    if name not in batch.shared:
        end = count * rows + 1
        batch.shared[name] = torch.arange(0, end, rows, dtype=torch.int32, device=batch.ids.device)
    ranges, starts = batch.ranges[kind], batch.shared[name]
    return _Sequences(
        starts, ranges.starts[: count + 1], ranges.lengths[:count], rows, ranges.longest_decode, causal=False
    )


def _chunked(batch: Batch, kind: int) -> _Sequences:
    """Return the sequences with chunks."""
    ranges, first, longest = batch.ranges[kind], batch.decode_tokens, batch.longest_query
    starts, lengths = ranges.starts[first:], ranges.lengths[first:]
    return _Sequences(batch.query_offsets, starts, lengths, longest, ranges.longest_chunk, causal=True)


# ---- FlashAttention 2 by its varlen call: compute capability 8.0 up ----------------------------------------


def _varlen(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Attend in a call for decoding sequences and one for chunks.

    The first has one query a sequence and no window, because their ranges are cut to it: only then does
    FlashAttention read keys once for the whole group of their query heads, and split long contexts.
    """
    decodes, outs = batch.decode_tokens, []
    if decodes:
        outs.append(_flash(query[:decodes], layer, _decoding(batch, layer.kind)))
    if batch.longest_query:
        outs.append(_flash(query[decodes:], layer, _chunked(batch, layer.kind)))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _flash(query: Tensor, layer: AttentionLayer, of: _Sequences) -> Tensor:
    """Return (T, H, D) of query (T, H, D)."""
    left, right = (FULL if layer.window is None else layer.window - 1, 0) if of.causal else (FULL, FULL)
    # by its operator: varlen_attn of torch 2.11 has no `seqused_k`, with which cum_seq_k are starts, not sums
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        query, layer.keys, layer.values, of.query_starts, of.key_starts, of.longest_query, of.longest_key,
        0.0, of.causal, False, scale=layer.scaling, window_size_left=left, window_size_right=right,
        seqused_k=of.lengths,
    )  # fmt: skip
    if layer.sinks is not None:  # sums (H, T) of all exponentials, as logarithms: the sink's is one more
        share = torch.sigmoid(sums - layer.sinks.float()[:, None]).t()[..., None]
        out = (out * share).to(out.dtype)
    found: Tensor = out
    return found


# ---- the memory-efficient kernel: any compute capability, float32, and any head dim ------------------------


def _efficient(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Attend in a call for decoding sequences and some for chunks: the kernel has no groups of heads.

    No key is repeated for it: in decoding, a group's query heads are queries of one head of keys.
    """
    decodes, outs = batch.decode_tokens, []
    tokens, heads, dim = query.shape
    grouped = query.view(tokens, layer.keys.shape[1], -1, dim)  # (N, K, G, D)
    if decodes:
        group = grouped.shape[2]
        rows = grouped[:decodes].transpose(1, 2).reshape(decodes * group, -1, dim)  # (R G, K, D)
        out = _kernel(rows, layer, _decoding(batch, layer.kind, rows=group))
        outs.append(out.view(decodes, group, -1, dim).transpose(1, 2).reshape(decodes, heads, dim))
    if batch.longest_query:
        outs.append(_efficient_chunks(grouped[decodes:], layer, _chunked(batch, layer.kind)))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _efficient_chunks(query: Tensor, layer: AttentionLayer, of: _Sequences) -> Tensor:
    """Return (T, H, D) of query (T, K, G, D): one head of each group at a time, or all of one group."""
    _, kv_heads, group, _ = query.shape
    if group <= kv_heads:
        outs, side = [_kernel(query[:, :, head], layer, of) for head in range(group)], 2
    else:
        outs, side = [_kernel(query[:, head], layer, of, kv_head=head) for head in range(kv_heads)], 1
    return outs[0] if len(outs) == 1 else torch.stack(outs, side).flatten(1, 2)


def _kernel(query: Tensor, layer: AttentionLayer, of: _Sequences, *, kv_head: int | None = None) -> Tensor:
    """Return (T, K, D) of query (T, K, D); of any number of heads that all see `kv_head`, if there is one."""
    keys, values = layer.keys, layer.values
    if kv_head is not None:
        keys, values = (each[:, kv_head, None].expand(-1, query.shape[1], -1) for each in (keys, values))
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        query[None], keys[None], values[None], None, of.query_starts, of.key_starts, of.longest_query,
        of.longest_key, 0.0, CAUSAL_FROM_BOTTOM_RIGHT if of.causal else 0, False,
        scale=layer.scaling, seqlen_k=of.lengths, window_size=layer.window if of.causal else None,
    )[0][0]  # fmt: skip
    return out


# ---- our own kernels: float32 on a CPU ---------------------------------------------------------------------


def _compiled(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Attend in a call for decoding sequences and one for each chunk."""
    kernel, ranges, decodes = layer.kernel, batch.ranges[layer.kind], batch.decode_tokens
    assert kernel is not None, "the form of a layer without a kernel"  # noqa: S101
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if decodes:
        lengths = ranges.lengths[:decodes]
        kernel.decode(query, out, starts=ranges.starts, lengths=lengths, reads=ranges.decode_reads)
    for chunk in batch.chunks:
        here = slice(chunk.offset, chunk.offset + chunk.count)
        start, length = chunk.ranges[layer.kind]
        kernel.chunk(query[here], out[here], start=start, length=length)
    return out


# ---- plain torch: what the other forms are compared with ---------------------------------------------------


def _plain(query: Tensor, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Attend in torch's own operations, also with capped scores."""
    ranges, decodes = batch.ranges[layer.kind], batch.decode_tokens
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    rows = max(1, PIECE // max(1, ranges.longest_decode))
    for first in range(0, decodes, rows):
        here = slice(first, min(first + rows, decodes))
        out[here] = _plain_decode(query[here], layer, (ranges.starts[here], ranges.lengths[here]),
                                  longest=ranges.longest_decode)  # fmt: skip
    for chunk in batch.chunks:
        here = slice(chunk.offset, chunk.offset + chunk.count)
        out[here] = _plain_chunk(query[here], layer, chunk, batch)
    return out


def _plain_decode(
    query: Tensor, layer: AttentionLayer, ranges: tuple[Tensor, Tensor], *, longest: int
) -> Tensor:
    """Return (R, H, D) of one token a sequence; `ranges`: start and length of each, (R,)."""
    (count, heads, dim), kv_heads = query.shape, layer.keys.shape[1]
    starts, lengths = (each[:, None] for each in ranges)
    place = torch.arange(longest, device=query.device)
    # beyond its range a sequence reads its own last position: 0 times another's NaN would be NaN
    positions = (starts + torch.minimum(place, lengths - 1)).flatten()
    keys, values = (
        each.transpose(0, 1).index_select(1, positions).view(kv_heads * count, longest, dim)
        for each in (layer.keys, layer.values)
    )  # (K R, L, D)
    grouped = (query * layer.scaling).view(count, kv_heads, -1, dim).transpose(0, 1)  # (K, R, G, D)
    scores = torch.bmm(grouped.reshape(kv_heads * count, -1, dim), keys.transpose(1, 2))
    scores = _cap(scores, layer).view(kv_heads, count, -1, longest)
    scores = scores.masked_fill(place >= lengths[:, None], -torch.inf)
    sinks = layer.sinks.view(kv_heads, 1, -1, 1) if layer.sinks is not None else None
    out = torch.bmm(_softmax(scores, sinks).flatten(0, 1), values).view(kv_heads, count, -1, dim)
    return out.transpose(0, 1).reshape(count, heads, dim)


def _plain_chunk(query: Tensor, layer: AttentionLayer, chunk: Chunk, batch: Batch) -> Tensor:
    """Return (T, H, D) of a chunk (T, H, D)."""
    start, length = chunk.ranges[layer.kind]
    keys, values = (each[start : start + length].transpose(0, 1) for each in (layer.keys, layer.values))
    states, visible = query.transpose(0, 1), _visible(chunk, layer, batch)
    if layer.softcap is None and layer.sinks is None:
        grouped = len(keys) != len(states)
        out = scaled_dot_product_attention(
            states[None], keys[None], values[None], visible, scale=layer.scaling, enable_gqa=grouped
        )
        return out[0].transpose(0, 1)
    group = len(states) // len(keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = _cap(torch.matmul(states * layer.scaling, keys.transpose(1, 2)), layer)
    sinks = layer.sinks.view(-1, 1, 1) if layer.sinks is not None else None
    weights = _softmax(scores.masked_fill(~visible, -torch.inf), sinks)
    return torch.matmul(weights, values).transpose(0, 1)


def _visible(chunk: Chunk, layer: AttentionLayer, batch: Batch) -> Tensor:
    """Return (T, L), true where a chunk's tokens see; made once for all layers of a kind."""
    name = ("visible", chunk.offset, layer.kind)
    if name not in batch.shared:
        _, length = chunk.ranges[layer.kind]
        place = torch.arange(length, device=batch.ids.device)
        token = place[length - chunk.count :, None]
        seen = place <= token
        batch.shared[name] = seen if layer.window is None else seen & (place > token - layer.window)
    made: Tensor = batch.shared[name]
    return made


def _cap(scores: Tensor, layer: AttentionLayer) -> Tensor:
    return scores if layer.softcap is None else torch.tanh(scores / layer.softcap) * layer.softcap


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in float32 whatever the type of the products."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1, dtype=torch.float32)[..., :-1].to(scores.dtype)


FORMS: Mapping[Form, Callable[[Tensor, AttentionLayer, Batch], Tensor]] = {
    "varlen": _varlen,
    "efficient": _efficient,
    "compiled": _compiled,
    "plain": _plain,
}
