"""Which tokens the sequences with penalties have so far, as tensors that grow with each token.

One entry for each sequence and token that it has: a vocabulary is many times that. `T` entries, `P` rows with
penalties, `C` all rows of a step, `V` the vocabulary. Does not know logits. Start at `Penalties`.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.serving.engine.sampler import Row, SeenTokens
from runtime.transfers import to_device

ROOM = 1024
"""Entries that tokens not seen before may add, before the tensors are made anew."""


class Penalties:
    """The penalties of the rows that have any, and the tokens that their sequences have."""

    def __init__(self, rows: Sequence[Row], vocabulary: int, device: torch.device) -> None:
        """`rows` (C,) of which some have penalties: `are_needed`."""
        self._vocabulary, self._device = vocabulary, device
        self._members = [n for n, row in enumerate(rows) if _is_penalised(row)]
        samplings = [rows[n].sampler.sampling for n in self._members]
        factors = [
            (each.repetition_penalty, each.presence_penalty, each.frequency_penalty) for each in samplings
        ]
        self._factors = to_device(torch.tensor(factors).T.contiguous(), device)
        """(3, P) float32: for repetition, presence and frequency."""
        self._used = 0
        self._fill([_seen_by(rows[n], vocabulary) for n in self._members])

    @staticmethod
    def are_needed(rows: Sequence[Row]) -> bool:
        """Whether any of `rows` has penalties."""
        return any(_is_penalised(row) for row in rows)

    def entries(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (flat, counts, factors) of all that the sequences of `rows`, as at first, have by now.

        Indices (T,) into flattened (C, V), how often the answer has the token (T,), and (3, T).
        """
        new: list[tuple[int, int, int, int]] = []
        for place, member in enumerate(self._members):
            row, seen = rows[member], self._seen[place]
            if row.supposed or seen.taken == len(row.sampler.generated):
                continue
            begin = seen.taken
            seen.follow(row.sampler.generated)
            for token in dict.fromkeys(row.sampler.generated[begin:]):
                column = seen.columns[token]
                at = self._place(place, column)
                new.append((at, member * self._vocabulary + token, place, seen.counts[column]))
        if self._used > self._table.shape[1]:
            self._fill(self._seen)
        elif new:
            changed = to_device(torch.tensor(new).T.contiguous(), self._device)
            self._table.index_copy_(1, changed[0], changed[1:])
        flat, places, counts = self._table[:, : self._used]
        return flat, counts, self._factors.index_select(1, places)

    def _place(self, place: int, column: int) -> int:
        """Return where the entry of one row's token is; a new one goes to the end."""
        if column < self._lengths[place]:
            return self._begins[place] + column
        at = self._added.setdefault((place, column), self._used)
        self._used = max(self._used, at + 1)
        return at

    def _fill(self, seen: list[SeenTokens]) -> None:
        self._seen = seen
        self._lengths = [len(each.ids) for each in seen]
        self._begins = [0, *itertools.accumulate(self._lengths)]
        self._added: dict[tuple[int, int], int] = {}
        self._used = self._begins[-1]
        table = np.zeros((3, self._used + ROOM), np.int64)
        for place, (each, member) in enumerate(zip(seen, self._members, strict=True)):
            entries = table[:, self._begins[place] : self._begins[place + 1]]
            entries[0] = np.frombuffer(each.ids, np.int64) + member * self._vocabulary
            entries[1], entries[2] = place, np.frombuffer(each.counts, np.int64)
        self._table = to_device(torch.from_numpy(table), self._device)
        """(3, T and room for more) int64: flat indices, rows, counts."""


def _is_penalised(row: Row) -> bool:
    sampling = row.sampler.sampling
    return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)


def _seen_by(row: Row, vocabulary: int) -> SeenTokens:
    """Return the tokens that a row's sequence has; ids that the model does not have are left out."""
    sampler = row.sampler
    seen = sampler.seen
    if seen is None:
        repeats = sampler.sampling.repetition_penalty != 1  # the other two are of the answer alone
        prompt = sampler.prompt_ids if repeats else ()
        seen = sampler.seen = SeenTokens(token for token in prompt if 0 <= token < vocabulary)
    seen.follow(sampler.generated)
    if row.supposed:
        seen = seen.copy()
        seen.follow([*sampler.generated, *row.supposed])
    return seen
