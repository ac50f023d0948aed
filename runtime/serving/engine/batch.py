"""One step of the model: as plain numbers, as tensors, and as the context in which its layers read them.

The flat tokens of a step: decoding sequences first, one token each; then sequences with drafts, then prompt
chunks, one after another. Shapes: `N` flat tokens, `R` tokens of decoding sequences, `B` sequences, of which
`C` have drafts or a prompt chunk. Does not know models or requests. Start at `describe` and `assemble`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.serving.engine.adapter_groups import AdapterGroups
from runtime.serving.engine.extents import Extent
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.scheduler import StepPlan
from runtime.transfers import to_device

Form = Literal["varlen", "efficient", "compiled", "plain"]
"""How attention is computed (attention_forms.py)."""


@dataclass(frozen=True, slots=True)
class KeyRanges:
    """Where the arena of one kind of layer holds what the step's sequences see, and takes their new tokens.

    The sequences are in flat order, decoding ones first. A range starts at the first position that some token
    of the step sees, so a decoding sequence sees the whole of its range, also in a window; it ends with the
    step's own tokens, and those of a chunk see it causally from its end, each the last `window` of it.
    """

    starts: Tensor
    """(B + 1,) int32 arena positions; the last is no sequence's (cu_seqlens has one more)."""
    lengths: Tensor
    """(B,) int32"""
    stores: Tensor
    """(N,) int64 arena positions of the flat tokens' own keys and values."""
    longest_decode: int = 0
    """Upper bound of the first R lengths; a host number."""
    longest_chunk: int = 0
    """Upper bound of the other C."""
    decode_reads: int = 0
    """Sum of the first R lengths."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` flat tokens from `offset` on, of one sequence that has drafts or a prompt chunk."""

    offset: int
    count: int
    ranges: tuple[tuple[int, int], ...]
    """(start, length) of the sequence by kind, as in `KeyRanges`, on the host."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass runs."""

    ids: Tensor
    """(1, N) token ids."""
    positions: Tensor
    """(1, N), counted in the sequence."""
    decode_tokens: int
    """R"""
    ranges: tuple[KeyRanges, ...]
    """By kind of layer."""
    query_offsets: Tensor
    """(C + 1,) int32: where each chunk begins among the tokens after the first R, and their number."""
    longest_query: int
    """Tokens of the longest chunk; 0 without one."""
    chunks: tuple[Chunk, ...]
    """The C sequences on the host; empty in a graph."""
    logit_indices: Tensor
    """Flat indices of the tokens whose logits are needed: decoding ones, drafts, the last of prompts; then
    those within prompts that are scored."""
    adapter_groups: AdapterGroups | None
    """Which flat tokens use which adapter; None when all use the base model."""
    long: Tensor | None
    """(N,) which flat tokens have rotary factors for long contexts; None when none has."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What the first layer that needs it makes for the others, such as masks."""


@dataclass(slots=True)
class StepContext:
    """What a model's layers share: kernels, form of attention, and the batch under way, set by the runner."""

    kernels: Kernels | None = None
    form: Form = "plain"
    batch: Batch | None = None

    @property
    def running(self) -> Batch:
        """The batch under way; RuntimeError outside a step."""
        if self.batch is None:
            raise RuntimeError("the model was called outside a step of its engine")
        return self.batch


@dataclass(frozen=True, slots=True)
class HostRanges:
    """`KeyRanges` as plain numbers: what is stored where follows from these."""

    starts: list[int]
    lengths: list[int]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One step as plain numbers, which rank 0 can broadcast."""

    ids: list[int]
    """Below 0, -1 - n is the n-th of the tokens chosen last, which the host has not read."""
    positions: list[int]
    decode_tokens: int
    counts: list[int]
    """Flat tokens of each sequence: 1 for the first `decode_tokens` of them."""
    ranges: tuple[HostRanges, ...]
    """By kind of layer."""
    logit_indices: list[int]
    adapters: list[int | None]
    """Adapter version of each token, None for the base model."""
    long: list[bool]
    """Whether each token has rotary factors for long contexts."""


def describe(plan: StepPlan, windows: Sequence[int | None]) -> HostBatch:
    """Return the numbers of `plan`, given the window of each kind of layer."""
    runs = [(sequence, sequence.filled, 1) for sequence in plan.decode]
    runs += [(draft.sequence, draft.sequence.filled, draft.count) for draft in plan.drafts]
    prompts = sum(count for _, _, count in runs)
    runs += [(chunk.sequence, chunk.start, chunk.count) for chunk in plan.chunks]
    drafted = {draft.sequence: draft.tokens for draft in plan.drafts}
    ids: list[int] = []
    positions: list[int] = []
    adapters: list[int | None] = []
    long: list[bool] = []
    for sequence, start, count in runs:
        own = sequence.ids[start : start + count]
        ids += own if len(own) == count else [*own, *drafted[sequence]]
        positions.extend(range(start, start + count))
        adapters += [sequence.adapter] * count
        long += [sequence.long] * count
    ends = [*itertools.accumulate((chunk.count for chunk in plan.chunks), initial=prompts)]
    last = [end - 1 for chunk, end in zip(plan.chunks, ends[1:], strict=True) if chunk.completes]
    begun = zip(plan.chunks, ends[:-1], strict=True)
    scored = [offset + position - chunk.start for chunk, offset in begun for position in chunk.scored]
    ranges = []
    for kind, window in enumerate(windows):
        found = [_range(run[0].extents[kind], window, run[1], run[2]) for run in runs]
        ranges.append(HostRanges([start for start, _ in found], [length for _, length in found]))
    return HostBatch(
        ids=ids,
        positions=positions,
        decode_tokens=len(plan.decode),
        counts=[count for _, _, count in runs],
        ranges=tuple(ranges),
        logit_indices=[*range(prompts), *last, *scored],
        adapters=adapters,
        long=long,
    )


def _range(extent: Extent, window: int | None, start: int, count: int) -> tuple[int, int]:
    """Return (arena position, length) of what the tokens at `start` to `start + count` of a sequence see."""
    first = 0 if window is None else max(0, start - window + 1)
    return extent.start + first - extent.base, start + count - first


def with_chosen(ids: Tensor, chosen: Tensor) -> Tensor:
    """Return `ids` with those below 0 replaced by what they stand for: -1 - n by `chosen`[n]."""
    return torch.where(ids < 0, chosen.take((-1 - ids).clamp_(min=0)), ids)


def assemble(
    host: HostBatch,
    adapter_groups: AdapterGroups | None,
    *,
    device: torch.device,
    chosen: Tensor | None = None,
) -> Batch:
    """Return the tensors of `host` on `device`; `chosen` (C,) are there for the ids below 0."""
    decodes, counts = host.decode_tokens, host.counts
    offsets = list(itertools.accumulate(counts[decodes:], initial=0))
    stores = [_stores(each, counts) for each in host.ranges]
    # one transfer for the numbers of each width
    wide = [host.ids, host.positions, host.logit_indices, *stores]
    ids, positions, logit_indices, *stored = _tensors(wide, torch.int64, device)
    narrow = [offsets, *([*each.starts, 0] for each in host.ranges), *(each.lengths for each in host.ranges)]
    query_offsets, *bounds = _tensors(narrow, torch.int32, device)
    ranges = []
    for kind, each in enumerate(host.ranges):
        starts, lengths = bounds[kind], bounds[len(host.ranges) + kind]
        decode, chunk = each.lengths[:decodes], each.lengths[decodes:]
        longest = max(decode, default=0), max(chunk, default=0)
        ranges.append(KeyRanges(starts, lengths, stored[kind], *longest, decode_reads=sum(decode)))
    return Batch(
        ids=(ids if chosen is None else with_chosen(ids, chosen))[None],
        positions=positions[None],
        decode_tokens=decodes,
        ranges=tuple(ranges),
        query_offsets=query_offsets,
        longest_query=max(counts[decodes:], default=0),
        chunks=_chunks(host, offsets),
        logit_indices=logit_indices,
        adapter_groups=adapter_groups,
        long=to_device(torch.tensor(host.long), device) if any(host.long) else None,
    )


def _stores(ranges: HostRanges, counts: list[int]) -> list[int]:
    """Return the arena position of each flat token: the last ones of its sequence's range."""
    ends = map(sum, zip(ranges.starts, ranges.lengths, strict=True))
    return [position for end, count in zip(ends, counts, strict=True) for position in range(end - count, end)]


def _chunks(host: HostBatch, offsets: list[int]) -> tuple[Chunk, ...]:
    first = host.decode_tokens
    return tuple(
        Chunk(
            first + offset,
            host.counts[first + index],
            tuple((each.starts[first + index], each.lengths[first + index]) for each in host.ranges),
        )
        for index, offset in enumerate(offsets[:-1])
    )


def _tensors(parts: list[list[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return a tensor on `device` for each list of numbers."""
    flat = torch.tensor([number for part in parts for number in part], dtype=dtype)
    return list(torch.split(to_device(flat, device), [len(part) for part in parts]))
