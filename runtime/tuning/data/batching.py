"""Which rows make an optimizer step, which rank computes which, and the tensors of a forward pass.

Everything here is a pure function of lengths and seeds, so that every rank knows the whole plan
without asking the others, and a resumed run finds the same one. Does not know files, models or losses.
B rows of a batch, T tokens, N columns with a label. Start at `BatchPlan.steps`, then `collate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from runtime.tuning.data.tokenize import TokenizedRow

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a token that is not in the loss (cross_entropy's `ignore_index`)."""

Layout = Literal["packed", "sorted"]


@dataclass(frozen=True, slots=True)
class RankBatch:
    """What one rank computes of one optimizer step."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Row numbers of each forward pass. A rank without rows has one pass over a row without labels."""
    labelled_tokens: int
    """Tokens in the loss of this step over all ranks: what its summed loss is divided by."""
    most_passes: int
    """Passes of the rank with the most."""
    idle: bool = False
    """The rank has no rows in this step and only takes part in the collectives."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How rows become steps; the same on every rank."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    labelled_tokens: tuple[int, ...]
    """Of each row."""
    rows_per_step: int
    """Over all ranks."""
    budget_tokens: int
    """Most tokens in one forward pass on one rank, padding included; a longer row goes alone."""
    layout: Layout
    world: int = 1
    seed: int = 42
    drop_last: bool = False
    """Leave out the last step of an epoch when it is not full."""
    shuffled: bool = True
    """Whether each epoch has an order of its own; else it is that of the rows."""

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(len(self.lengths), self.rows_per_step)
        return full if self.drop_last and full else full + bool(rest)

    def steps(self, epoch: int) -> Iterator[tuple[int, ...]]:
        """Yield the rows of each step of `epoch`: every row once, in an order that (seed, epoch) decides."""
        order = np.arange(len(self.lengths))
        if self.shuffled:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        for step in range(self.steps_per_epoch):
            start = step * self.rows_per_step
            yield tuple(int(row) for row in order[start : start + self.rows_per_step])

    def rank_batch(self, rows: Sequence[int], rank: int) -> RankBatch:
        """Return what `rank` computes of the step with `rows`."""
        passes = [self.micro_batches(own_rows) for own_rows in partition(rows, self.lengths, self.world)]
        labelled_tokens = sum(self.labelled_tokens[row] for row in rows)
        most = max(len(own) for own in passes)
        if not passes[rank]:
            shortest = min(rows, key=lambda row: self.lengths[row])
            return RankBatch(((shortest,),), labelled_tokens, most, idle=True)
        return RankBatch(passes[rank], labelled_tokens, most)

    def micro_batches(self, rows: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return `rows` as the forward passes of one rank."""
        arrange = pack if self.layout == "packed" else group
        return arrange(rows, self.lengths, self.budget_tokens)


def partition(rows: Sequence[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Distribute `rows` over `world` ranks, longest first to the rank with the fewest tokens so far."""
    per_rank: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        rank = tokens.index(min(tokens))
        per_rank[rank].append(row)
        tokens[rank] += lengths[row]
    return per_rank


def pack(rows: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Pack `rows` into sequences of at most `budget_tokens`, longest first into the first that has room."""
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        first = next((index for index, left in enumerate(room) if left >= lengths[row]), None)
        if first is None:
            packs.append([row])
            room.append(budget_tokens - lengths[row])
        else:
            packs[first].append(row)
            room[first] -= lengths[row]
    return tuple(tuple(packed) for packed in packs)


def group(rows: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Group `rows` of similar length so that each padded rectangle holds at most `budget_tokens`."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(tuple(grouped) for grouped in groups)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward pass."""

    inputs: "dict[str, torch.Tensor]"
    """Arguments of the model: input_ids (B, T), and its positions or its padding."""
    logits_to_keep: "torch.Tensor"
    """(N,) columns whose next token is labelled in some row: logits are computed there alone."""
    labels: "torch.Tensor"
    """(B, N) the next token at each of these columns, IGNORE where it is not labelled in that row."""
    tokens: int
    """Tokens of the rows, without padding."""
    document_lengths: tuple[int, ...] = ()
    """Tokens of each row of a pack, for the attention; the host's numbers, so that no layer asks a GPU."""

    @property
    def labelled(self) -> "torch.Tensor":
        """(M,) where the flattened labels (B · N) are not IGNORE."""
        return (self.labels.flatten() != IGNORE).nonzero().flatten()


def collate(
    rows: Sequence[TokenizedRow], layout: Layout, *, pad_id: int, with_labels: bool = True
) -> MicroBatch:
    """Lay `rows` out for one forward pass, without any label unless `with_labels`."""
    return _packed(rows, with_labels) if layout == "packed" else _padded(rows, pad_id, with_labels)


def _packed(rows: Sequence[TokenizedRow], with_labels: bool) -> MicroBatch:
    """One row of all documents end to end: restarting positions, no mask, lengths for the attention."""
    import torch

    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    loss_mask = np.concatenate([row.loss_mask for row in rows])
    lengths = tuple(len(row) for row in rows)
    loss_mask[np.cumsum((0, *lengths[:-1]))] = False  # nothing predicts a document's first token
    columns = np.flatnonzero(loss_mask) - 1 if with_labels else np.zeros(0, dtype=np.int64)
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],  # (1, T)
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
    }
    labels = torch.from_numpy(ids[columns + 1])[None]  # (1, N)
    return MicroBatch(inputs, torch.from_numpy(columns), labels, len(ids), lengths)


def _padded(rows: Sequence[TokenizedRow], pad_id: int, with_labels: bool) -> MicroBatch:
    """A rectangle, padded on the right and masked there."""
    import torch

    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)  # label of the *next* token in each column
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row.ids
        mask[number, : len(row)] = 1
        if with_labels:
            labels[number, : len(row) - 1] = np.where(row.loss_mask[1:], row.ids[1:], IGNORE)
    columns = np.flatnonzero((labels != IGNORE).any(axis=0))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    kept = torch.from_numpy(labels[:, columns])  # (B, N)
    return MicroBatch(inputs, torch.from_numpy(columns), kept, int(mask.sum()))
