"""One step as tensors: the flat tokens of all rows, and where each belongs.

Decoding rows come first, one token each, in slot order; then rows with guesses, then prompt chunks, one
after another. `N` flat tokens, `R` decoding rows, `L` positions. Does not know models or requests. Start
at `describe` and `assemble`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.serving.engine.lora import AdapterGroups, AdapterStore
from runtime.serving.engine.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Decoding rows in `count` neighbouring slots, `first` up: flat tokens `offset` up, `queries` of each."""

    offset: int
    first: int
    count: int
    longest: int
    """Positions of the longest of them, the new token included."""
    lengths: Tensor
    """(count * queries,) positions that each token sees, itself included."""
    ragged: bool
    """Whether some of them see fewer than `longest`."""
    queries: int = 1


@dataclass(frozen=True, slots=True)
class SlotChunk:
    """A chunk of one row: flat tokens `offset` up are positions `start` up of `slot`."""

    offset: int
    slot: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass runs."""

    ids: Tensor
    """(1, N) token ids."""
    positions: Tensor
    """(1, N)"""
    decodes: int
    """R"""
    slots: Tensor
    """(N,) slot of each token."""
    places: Tensor
    """(R,) position of each decoding row's token."""
    runs: tuple[SlotRun, ...]
    chunks: tuple[SlotChunk, ...]
    chosen: Tensor
    """Flat indices after which a token is chosen: decoding rows, all of those ahead, ends of prompts."""
    groups: AdapterGroups | None
    """Which flat tokens use which adapter; None when all are the base's."""
    long: Tensor | None
    """(N,) which flat tokens have rotary factors for long contexts; None when none has."""
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    """Attention masks, made in the first layer that needs one and shared by the rest."""


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One step as plain numbers, which every process that shares the model can be told."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    """Of the decoding rows, whose tokens come first."""
    pieces: tuple[SlotChunk, ...]
    chosen: list[int]
    owners: list[tuple[int | None, int]]
    """(adapter version or None, tokens) in flat order."""
    long: list[bool]
    copies: list[tuple[int, int, int]]
    """(source slot, target slot, positions) to make first."""


def describe(plan: StepPlan) -> HostBatch:
    """Return the numbers of `plan`."""
    ids, positions = [], []
    for row in plan.decode:
        ids.append(row.ids[row.filled])
        positions.append(row.filled)
    pieces = []
    for draft in plan.drafts:
        row = draft.sequence
        pieces.append(SlotChunk(len(ids), row.slot, row.filled, draft.count))
        ids += [row.ids[row.filled], *draft.tokens]
        positions.extend(range(row.filled, row.filled + draft.count))
    chosen = list(range(len(ids)))
    for chunk in plan.chunks:
        start = chunk.start
        pieces.append(SlotChunk(len(ids), chunk.sequence.slot, start, chunk.count))
        ids.extend(chunk.sequence.ids[start : start + chunk.count])
        positions.extend(range(start, start + chunk.count))
        if chunk.completes:
            chosen.append(len(ids) - 1)
    counts = [(row, 1) for row in plan.decode]
    counts += [(draft.sequence, draft.count) for draft in plan.drafts]
    counts += [(chunk.sequence, chunk.count) for chunk in plan.chunks]
    owners = [(row.adapter, count) for row, count in counts]
    long = [row.long for row, count in counts for _ in range(count)]
    slots = [row.slot for row in plan.decode]
    copies = [(copy.source, copy.sequence.slot, copy.count) for copy in plan.copies]
    return HostBatch(ids, positions, slots, tuple(pieces), chosen, owners, long, copies)


def assemble(work: HostBatch, bank: AdapterStore) -> Batch:
    """Return the tensors of `work`, on the device of `bank`."""
    ids, positions, slots, chosen, long = work.ids, work.positions, work.slots, work.chosen, work.long
    places = positions[: len(slots)]
    # one transfer for all the numbers of a step
    owners = [*slots, *(piece.slot for piece in work.pieces for _ in range(piece.count))]
    numbers = torch.tensor([*ids, *positions, *owners, *places, *chosen]).to(bank.device, non_blocking=True)
    sizes = [len(ids), len(positions), len(owners), len(places), len(chosen)]
    id_part, position_part, slot_part, place_part, chosen_part = torch.split(numbers, sizes)
    return Batch(
        ids=id_part[None],
        positions=position_part[None],
        decodes=len(slots),
        slots=slot_part,
        places=place_part,
        runs=_runs(slots, places, place_part),
        chunks=work.pieces,
        chosen=chosen_part,
        groups=bank.group(work.owners),
        long=torch.tensor(long).to(bank.device, non_blocking=True) if any(long) else None,
    )


def _runs(slots: list[int], places: list[int], place_part: Tensor) -> tuple[SlotRun, ...]:
    """Split the decoding rows where their slots are not neighbours."""
    runs, begin = [], 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            own = places[begin:end]
            longest, ragged = max(own) + 1, min(own) < max(own)
            runs.append(
                SlotRun(begin, slots[begin], end - begin, longest, place_part[begin:end] + 1, ragged=ragged)
            )
            begin = end
    return tuple(runs)
