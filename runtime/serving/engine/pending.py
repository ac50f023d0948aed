"""The tokens of one step, from the logits to what the host knows of them.

They may stay on the device while the next step runs (`BatchingEngine`); where there is no memory to choose
for all rows at once they are chosen row by row. Does not know requests or what ends an answer. Start at
`PendingTokens.begin`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.errors import is_out_of_memory
from runtime.serving.engine.sampler import Choice, Row
from runtime.serving.engine.sampling import Chosen, TokenChooser
from runtime.serving.engine.scheduler import Sequence, StepPlan
from runtime.transfers import to_device


@dataclass(frozen=True, slots=True)
class RowOutput:
    """One token to choose, and what came of it."""

    row: Row
    choice: Choice | None
    """None where there was no memory for it."""
    logits: Tensor | None = None
    """(V,), of a row that waits."""

    @property
    def is_finite(self) -> bool:
        """Whether its logits are, as far as is known."""
        return self.choice is None or self.choice.finite


Due = list[tuple[Sequence, tuple[int, ...]]]
"""Sequences that get a token, in the order of their logits, each with its draft."""


def due_of(plan: StepPlan) -> Due:
    """Return the sequences that get a token after `plan`."""
    return [
        *((sequence, ()) for sequence in plan.decode),
        *((draft.sequence, draft.tokens) for draft in plan.drafts),
        *((chunk.sequence, ()) for chunk in plan.chunks if chunk.completes),
    ]


def keep(plan: StepPlan, logits: Tensor, stays: Callable[[Sequence], bool]) -> tuple[StepPlan, Tensor]:
    """Return `plan` and its logits (C, V) with those of its decoding sequences that `stays` says."""
    kept = plan.keep(stays)
    if kept is plan:
        return plan, logits
    places = {sequence: n for n, sequence in enumerate(plan.decode)}
    rows = [*(places[sequence] for sequence in kept.decode), *range(len(places), len(logits))]
    return kept, logits.index_select(0, to_device(torch.tensor(rows, dtype=torch.long), logits.device))


class Choosing:
    """Chooses tokens, with as much memory as there is."""

    def __init__(self, free_memory: Callable[[], None]) -> None:
        """`free_memory` gives back what is free after memory ran out."""
        self._chooser, self._free_memory = TokenChooser(), free_memory

    def begin(self, due: Due, rows: list[Row], logits: Tensor) -> "PendingTokens":
        """Have the device choose for `rows`, those of `due` with their drafts, by their logits (C, V)."""
        try:
            return PendingTokens(due, rows, logits, self._chooser.enqueue(logits, rows))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return PendingTokens(due, rows, logits, None)

    def finish(self, pending: "PendingTokens") -> Iterator[RowOutput]:
        """Wait for the tokens of `pending`, and return them in its order."""
        choices = self._finish(pending)
        for n, (row, choice) in enumerate(zip(pending.rows, choices, strict=True)):
            yield RowOutput(row, choice, pending.logits[n] if row.waits else None)

    def choose(self, logits: Tensor, rows: list[Row]) -> list[Choice | None]:
        """Return what is chosen for `rows` by their logits (C, V); None where there is no memory for it."""
        return self._finish(self.begin([], rows, logits))

    def _finish(self, pending: "PendingTokens") -> list[Choice | None]:
        logits, chosen = pending.logits, pending.chosen
        if chosen is not None:
            try:
                return [*self._chooser.finish(chosen)]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            logits = chosen.logits
        self._free_memory()  # not in the handler: the traceback holds what was computed
        if len(pending.rows) == 1:
            return [None]
        choices = [
            choice for n, row in enumerate(pending.rows) for choice in self.choose(logits[n : n + 1], [row])
        ]
        # the device may have had others
        return [each and replace(each, again=True) for each in choices]


@dataclass(slots=True)
class PendingTokens:
    """What a step is about to give its sequences."""

    due: Due
    rows: list[Row]
    logits: Tensor
    """(C, V), of the rows."""
    chosen: Chosen | None
    """None where there was no memory for all rows at once."""

    def leave(self, chosen: Chosen) -> None:
        """Give each sequence a stand-in for its token, which only the device knows: see `HostBatch.ids`."""
        chosen.keep(self.logits)
        self.logits = chosen.logits
        for n, (sequence, _) in enumerate(self.due):
            sequence.ids.append(-1 - n)

    def take_back(self, sequence: Sequence) -> None:
        """Remove the stand-in for the token of `sequence`, where it has one."""
        if sequence.ids[-1] < 0:
            sequence.ids.pop()
