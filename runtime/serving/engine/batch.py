"""One step of the model: as plain numbers, as tensors, and as the context in which its layers read them.

The flat tokens of a step: decoding sequences first, one token each, in slot order; then sequences with
drafts, then prompt chunks, one after another. Shapes: `N` flat tokens, `R` tokens of decoding sequences, `L`
positions. Does not know models or requests. Start at `describe` and `assemble`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.serving.engine.adapter_groups import AdapterGroups
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Decoding sequences in `count` neighbouring slots from `first` on, with flat tokens from `offset` on."""

    offset: int
    first: int
    count: int
    longest: int
    """Positions of the longest of them, the new token included."""
    lengths: Tensor
    """(count * slot_tokens,) positions that each token sees, itself included."""
    ragged: bool
    """Whether some of them see fewer than `longest`."""
    slot_tokens: int = 1
    """Tokens of each slot."""


@dataclass(frozen=True, slots=True)
class SlotChunk:
    """`count` flat tokens from `offset` on are positions of `slot` from `start` on."""

    offset: int
    slot: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """The first `count` positions of slot `source` are copied to slot `target` before the step."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass runs."""

    ids: Tensor
    """(1, N) token ids."""
    positions: Tensor
    """(1, N)"""
    decode_tokens: int
    """R"""
    slots: Tensor
    """(N,) slot of each token."""
    decode_positions: Tensor
    """(R,) positions of the tokens of decoding sequences."""
    runs: tuple[SlotRun, ...]
    chunks: tuple[SlotChunk, ...]
    logit_indices: Tensor
    """Flat indices of the tokens whose logits are needed: decoding ones, drafts, and the last of prompts."""
    adapter_groups: AdapterGroups | None
    """Which flat tokens use which adapter; None when all use the base model."""
    long: Tensor | None
    """(N,) which flat tokens have rotary factors for long contexts; None when none has."""
    decode_reads: int = 0
    """Positions that the decoding sequences read together."""
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    """Attention masks, made in the first layer that needs one and shared by the rest."""


@dataclass(slots=True)
class StepContext:
    """What the layers of one model share: their kernels, and the batch under way, set by the model runner."""

    kernels: Kernels | None = None
    batch: Batch | None = None

    @property
    def running(self) -> Batch:
        """The batch under way; RuntimeError outside a step."""
        if self.batch is None:
            raise RuntimeError("the model was called outside a step of its engine")
        return self.batch


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One step as plain numbers, which rank 0 can broadcast."""

    ids: list[int]
    positions: list[int]
    decode_slots: list[int]
    """Of the decoding sequences, whose tokens come first."""
    chunks: tuple[SlotChunk, ...]
    logit_indices: list[int]
    adapters: list[int | None]
    """Adapter version of each token, None for the base model."""
    long: list[bool]
    """Whether each token has rotary factors for long contexts."""
    copies: list[SlotCopy]


def describe(plan: StepPlan) -> HostBatch:
    """Return the numbers of `plan`."""
    ids: list[int] = []
    positions: list[int] = []
    adapters: list[int | None] = []
    long: list[bool] = []
    chunks = []
    for sequence in plan.decode:
        ids.append(sequence.ids[sequence.filled])
        positions.append(sequence.filled)
        adapters.append(sequence.adapter)
        long.append(sequence.long)
    for draft in plan.drafts:
        sequence = draft.sequence
        chunks.append(SlotChunk(len(ids), sequence.slot, sequence.filled, draft.count))
        ids += [sequence.ids[sequence.filled], *draft.tokens]
        positions.extend(range(sequence.filled, sequence.filled + draft.count))
        adapters += [sequence.adapter] * draft.count
        long += [sequence.long] * draft.count
    logit_indices = list(range(len(ids)))
    for chunk in plan.chunks:
        sequence, start = chunk.sequence, chunk.start
        chunks.append(SlotChunk(len(ids), sequence.slot, start, chunk.count))
        ids.extend(sequence.ids[start : start + chunk.count])
        positions.extend(range(start, start + chunk.count))
        adapters += [sequence.adapter] * chunk.count
        long += [sequence.long] * chunk.count
        if chunk.completes:
            logit_indices.append(len(ids) - 1)
    decode_slots = [sequence.slot for sequence in plan.decode]
    copies = [SlotCopy(copy.source, copy.sequence.slot, copy.count) for copy in plan.copies]
    return HostBatch(ids, positions, decode_slots, tuple(chunks), logit_indices, adapters, long, copies)


def assemble(host: HostBatch, adapter_groups: AdapterGroups | None, *, device: torch.device) -> Batch:
    """Return the tensors of `host` on `device`."""
    decodes = len(host.decode_slots)
    decode_positions = host.positions[:decodes]
    slots = [*host.decode_slots, *(chunk.slot for chunk in host.chunks for _ in range(chunk.count))]
    # one transfer for all the numbers of a step
    numbers = [*host.ids, *host.positions, *slots, *decode_positions, *host.logit_indices]
    sizes = [len(host.ids), len(host.positions), len(slots), decodes, len(host.logit_indices)]
    on_device = torch.tensor(numbers).to(device, non_blocking=True)
    ids, positions, token_slots, last_positions, logit_indices = torch.split(on_device, sizes)
    runs = _runs(host.decode_slots, decode_positions, last_positions)
    return Batch(
        ids=ids[None],
        positions=positions[None],
        decode_tokens=decodes,
        slots=token_slots,
        decode_positions=last_positions,
        runs=runs,
        chunks=host.chunks,
        logit_indices=logit_indices,
        adapter_groups=adapter_groups,
        long=torch.tensor(host.long).to(device, non_blocking=True) if any(host.long) else None,
        decode_reads=sum(run.count * run.longest for run in runs),
    )


def _runs(slots: list[int], positions: list[int], on_device: Tensor) -> tuple[SlotRun, ...]:
    """Split the decoding sequences where slots are not neighbours; `on_device` (R,) are the positions."""
    runs, begin = [], 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            last = positions[begin:end]
            longest, ragged = max(last) + 1, min(last) < max(last)
            lengths = on_device[begin:end] + 1
            runs.append(SlotRun(begin, slots[begin], end - begin, longest, lengths, ragged=ragged))
            begin = end
    return tuple(runs)
