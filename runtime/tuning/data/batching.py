"""Which rows make an optimizer step, which rank computes which of their sequences, and a pass's tensors.

Everything here is a pure function of lengths and seeds, so that every rank knows the whole plan
without asking the others, and a resumed run finds the same one. Does not know files, models or losses.
B rows of a tensor, T tokens, N columns with a label. Start at `BatchPlan.steps`, then `collate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from runtime.tuning.data.tokenize import TokenizedSequence

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a token that is not in the loss (cross_entropy's `ignore_index`)."""

Layout = Literal["packed", "sorted"]


@dataclass(frozen=True, slots=True)
class RankBatch:
    """What one rank computes of one optimizer step."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Sequence numbers of each forward pass. A rank without any has one pass over one without labels."""
    labelled_tokens: int
    """Tokens in the loss of this step over all ranks: what its summed loss is divided by."""
    most_passes: int
    """Passes of the rank with the most."""
    idle: bool = False
    """The rank has no sequences in this step and only takes part in the collectives."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How rows become steps, each with all sequences of its rows; the same on every rank."""

    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    labelled_tokens: tuple[int, ...]
    """Of each sequence."""
    rows_per_step: int
    """Over all ranks."""
    budget_tokens: int
    """Most tokens in one forward pass on one rank, padding included; a longer sequence goes alone."""
    layout: Layout
    world: int = 1
    seed: int = 42
    drop_last: bool = False
    """Leave out the last step of an epoch when it is not full."""
    shuffled: bool = True
    """Whether each epoch has an order of its own; else it is that of the rows."""
    sequences_per_row: tuple[int, ...] = ()
    """How many of the sequences, in their order, are each row; () where every one is a row."""

    @property
    def rows(self) -> int:
        return len(self.sequences_per_row or self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.rows, self.rows_per_step)
        return full if self.drop_last and full else full + bool(rest)

    def steps(self, epoch: int) -> Iterator[tuple[int, ...]]:
        """Yield the sequences of each step of `epoch`: each row once, in an order by (seed, epoch)."""
        order = np.arange(self.rows)
        if self.shuffled:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = np.cumsum(self.sequences_per_row or np.ones(self.rows, dtype=np.int64))
        starts = np.concatenate(([0], ends[:-1]))
        for step in range(self.steps_per_epoch):
            first = step * self.rows_per_step
            rows = order[first : first + self.rows_per_step]
            yield tuple(sequence for row in rows for sequence in range(int(starts[row]), int(ends[row])))

    def rank_batch(self, sequences: Sequence[int], rank: int) -> RankBatch:
        """Return what `rank` computes of the step with `sequences`."""
        passes = [self.micro_batches(own) for own in partition(sequences, self.lengths, self.world)]
        labelled_tokens = sum(self.labelled_tokens[sequence] for sequence in sequences)
        most = max(len(own) for own in passes)
        if not passes[rank]:
            shortest = min(sequences, key=lambda sequence: self.lengths[sequence])
            return RankBatch(((shortest,),), labelled_tokens, most, idle=True)
        return RankBatch(passes[rank], labelled_tokens, most)

    def micro_batches(self, sequences: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return `sequences` as the forward passes of one rank."""
        arrange = pack if self.layout == "packed" else group
        return arrange(sequences, self.lengths, self.budget_tokens)


def partition(sequences: Sequence[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Distribute `sequences` over `world` ranks, longest first to the rank with the fewest tokens so far."""
    per_rank: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for sequence in sorted(sequences, key=lambda sequence: (-lengths[sequence], sequence)):
        rank = tokens.index(min(tokens))
        per_rank[rank].append(sequence)
        tokens[rank] += lengths[sequence]
    return per_rank


def pack(sequences: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Pack `sequences` into passes of at most `budget_tokens`, longest first into the first that has room."""
    packs: list[list[int]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: (-lengths[sequence], sequence)):
        first = next((index for index, left in enumerate(room) if left >= lengths[sequence]), None)
        if first is None:
            packs.append([sequence])
            room.append(budget_tokens - lengths[sequence])
        else:
            packs[first].append(sequence)
            room[first] -= lengths[sequence]
    return tuple(tuple(packed) for packed in packs)


def group(
    sequences: Sequence[int], lengths: Sequence[int], budget_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Group `sequences` of similar length so that a padded rectangle holds at most `budget_tokens`."""
    groups: list[list[int]] = []
    for sequence in sorted(sequences, key=lambda sequence: (-lengths[sequence], sequence)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget_tokens:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
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
    """Tokens of the sequences, without padding."""
    document_lengths: tuple[int, ...] = ()
    """Tokens of each sequence of a pack, for the attention; the host's, so that no layer asks a GPU."""

    @property
    def labelled(self) -> "torch.Tensor":
        """(M,) where the flattened labels (B · N) are not IGNORE."""
        return (self.labels.flatten() != IGNORE).nonzero().flatten()


def collate(
    sequences: Sequence[TokenizedSequence], layout: Layout, *, pad_id: int, with_labels: bool = True
) -> MicroBatch:
    """Lay `sequences` out for one forward pass, without any label unless `with_labels`."""
    return _packed(sequences, with_labels) if layout == "packed" else _padded(sequences, pad_id, with_labels)


def _packed(sequences: Sequence[TokenizedSequence], with_labels: bool) -> MicroBatch:
    """One row of all documents end to end: restarting positions, no mask, lengths for the attention."""
    import torch

    ids = np.concatenate([sequence.ids for sequence in sequences]).astype(np.int64)
    loss_mask = np.concatenate([sequence.loss_mask for sequence in sequences])
    lengths = tuple(len(sequence) for sequence in sequences)
    loss_mask[np.cumsum((0, *lengths[:-1]))] = False  # nothing predicts a document's first token
    columns = np.flatnonzero(loss_mask) - 1 if with_labels else np.zeros(0, dtype=np.int64)
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],  # (1, T)
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
    }
    labels = torch.from_numpy(ids[columns + 1])[None]  # (1, N)
    return MicroBatch(inputs, torch.from_numpy(columns), labels, len(ids), lengths)


def _padded(sequences: Sequence[TokenizedSequence], pad_id: int, with_labels: bool) -> MicroBatch:
    """A rectangle, padded on the right and masked there."""
    import torch

    width = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    labels = np.full(
        (len(sequences), width), IGNORE, dtype=np.int64
    )  # label of the *next* token in each column
    for number, sequence in enumerate(sequences):
        ids[number, : len(sequence)] = sequence.ids
        mask[number, : len(sequence)] = 1
        if with_labels:
            labels[number, : len(sequence) - 1] = np.where(sequence.loss_mask[1:], sequence.ids[1:], IGNORE)
    columns = np.flatnonzero((labels != IGNORE).any(axis=0))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    kept = torch.from_numpy(labels[:, columns])  # (B, N)
    return MicroBatch(inputs, torch.from_numpy(columns), kept, int(mask.sum()))
