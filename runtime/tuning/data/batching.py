"""Which rows make an optimizer step, which rank takes which, and how they lie in a forward pass.

Everything here is a pure function of lengths and seeds, so that every rank knows the whole plan
without asking the others, and a resumed run finds the same one. Start at `BatchPlan.steps`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from runtime.tuning.data.tokenize import TokenizedRow

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a token that does not count in the loss."""

Layout = Literal["packed", "sorted"]


@dataclass(frozen=True, slots=True)
class RankBatch:
    """What one rank computes of one optimizer step."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Row numbers of each forward pass. A rank without rows has one pass over a row that counts nothing."""
    targets: int
    """Tokens in the loss of this step over all ranks: what its summed loss is divided by."""
    idle: bool = False
    """The rank has no rows in this step and only keeps the others company."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How rows become steps; the same on every rank."""

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    rows_per_step: int
    """Over all ranks."""
    budget_tokens: int
    """Most tokens in one forward pass on one rank, padding included; a longer row goes alone."""
    layout: Layout
    world: int = 1
    seed: int = 42
    drop_last: bool = False
    """Leave out the last step of an epoch when it is not full."""

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(len(self.lengths), self.rows_per_step)
        return full if self.drop_last and full else full + bool(rest)

    def steps(self, epoch: int) -> Iterator[tuple[int, ...]]:
        """Yield the rows of each step of `epoch`: every row once, in an order of (seed, epoch)."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        for step in range(self.steps_per_epoch):
            start = step * self.rows_per_step
            yield tuple(int(row) for row in order[start : start + self.rows_per_step])

    def share(self, rows: Sequence[int], rank: int) -> RankBatch:
        """Return what `rank` computes of the step with `rows`."""
        mine = partition(rows, self.lengths, self.world)[rank]
        targets = sum(self.targets[row] for row in rows)
        if not mine:
            shortest = min(rows, key=lambda row: self.lengths[row])
            return RankBatch(((shortest,),), targets, idle=True)
        return RankBatch(self.passes(mine), targets)

    def passes(self, rows: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return `rows` as the forward passes of one rank."""
        arrange = pack if self.layout == "packed" else group
        return arrange(rows, self.lengths, self.budget_tokens)


def partition(rows: Sequence[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Deal `rows` to `world` ranks with token counts as even as longest-first gives."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        lightest = loads.index(min(loads))
        shares[lightest].append(row)
        loads[lightest] += lengths[row]
    return shares


def pack(rows: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Fill sequences of at most `budget_tokens` with `rows`, longest first into the first that has room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        place = next((index for index, left in enumerate(room) if left >= lengths[row]), None)
        if place is None:
            bins.append([row])
            room.append(budget_tokens - lengths[row])
        else:
            bins[place].append(row)
            room[place] -= lengths[row]
    return tuple(tuple(content) for content in bins)


def group(rows: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Group `rows` of similar length so that each padded rectangle holds at most `budget_tokens`."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(tuple(content) for content in groups)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward pass. B rows, T tokens, N tokens that count."""

    inputs: "dict[str, torch.Tensor]"
    """Arguments of the model: input_ids (B, T) and what keeps its rows apart."""
    places: "torch.Tensor"
    """(N,) columns t whose hidden state predicts a learnt token."""
    labels: "torch.Tensor"
    """(B, N) the token after each place, IGNORE where that row learns nothing there."""
    tokens: int
    """Tokens of the rows, without padding."""


def collate(rows: Sequence[TokenizedRow], layout: Layout, *, pad_id: int, counts: bool = True) -> MicroBatch:
    """Lay `rows` out for one forward pass; with `counts` false no token is a label."""
    return _packed(rows, counts) if layout == "packed" else _padded(rows, pad_id, counts)


def _packed(rows: Sequence[TokenizedRow], counts: bool) -> MicroBatch:
    """One row of all documents end to end: restarting positions, no mask, borders for the attention."""
    import torch

    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    learnt = np.concatenate([row.learnt for row in rows])
    borders = np.cumsum([0, *(len(row) for row in rows)])
    learnt[borders[:-1]] = False  # nothing predicts a document's first token
    places = np.flatnonzero(learnt) - 1 if counts else np.zeros(0, dtype=np.int64)
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],  # (1, T)
        "position_ids": torch.from_numpy(np.concatenate([np.arange(len(row)) for row in rows]))[None],
        "cu_seq_lens_q": torch.from_numpy(borders.astype(np.int32)),
        "cu_seq_lens_k": torch.from_numpy(borders.astype(np.int32)),
    }
    labels = torch.from_numpy(ids[places + 1])[None]  # (1, N)
    return MicroBatch(inputs, torch.from_numpy(places), labels, len(ids))


def _padded(rows: Sequence[TokenizedRow], pad_id: int, counts: bool) -> MicroBatch:
    """A rectangle, padded on the right and masked there."""
    import torch

    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)  # label of the *next* token at each place
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row.ids
        mask[number, : len(row)] = 1
        if counts:
            labels[number, : len(row) - 1] = np.where(row.learnt[1:], row.ids[1:], IGNORE)
    places = np.flatnonzero((labels != IGNORE).any(axis=0))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    kept = torch.from_numpy(labels[:, places])  # (B, N)
    return MicroBatch(inputs, torch.from_numpy(places), kept, int(mask.sum()))
