"""Decides which rows take part in a step: every row that decodes, then chunks of prompts under a budget.

Where one row decodes alone, its next tokens are guessed ahead (guess.py).

A row is a request in a slot of the key-value cache. Pure Python over numbers: does not know tensors,
threads or why an answer ends. Start at `Scheduler.plan`.
"""

from collections import deque
from dataclasses import dataclass, field

from runtime.serving.engine.prompt_lookup import PromptLookup

LEAST_SHARED = 8
"""Shared beginnings below this many tokens are not worth copying."""
WORTH_WAITING = 64
"""Tokens that the step under way computes for another row: from this many on, a prompt waits for them."""
GUESSING_ROWS = 1
"""Up to this many rows decode with guesses: on a CPU two gain 3 % and four lose 5 % (RESULTS.md)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in its slot."""

    adapter: int | None
    """Version of the adapter, unique for ever: equal tokens have equal keys and values only under one."""
    slot: int
    ids: list[int]
    """Prompt and what was generated so far."""
    prompt_tokens: int
    guess_until: int = 0
    """Length of `ids` beyond which nothing is guessed."""
    filled: int = 0
    """How many of `ids` have their keys and values in the slot."""
    reused: int = 0
    """How many of these were found in the cache, not computed."""
    long: bool = False
    """Whether its positions are turned by the factors for long contexts, which make other keys."""
    guesser: PromptLookup = field(default_factory=PromptLookup)

    @property
    def decodes(self) -> bool:
        """Whether exactly the newest token is left to run."""
        return self.filled == len(self.ids) - 1 and len(self.ids) > self.prompt_tokens


@dataclass(slots=True)
class Slot:
    """What a slot of the cache holds, also after its row is gone."""

    ids: list[int] = field(default_factory=list)
    adapter: int | None = None
    long: bool = False
    row: Sequence | None = None
    used: int = 0
    """Clock of the last retirement, to reuse the slot that was idle longest."""


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """`count` prompt tokens of `row`, from position `start` on."""

    row: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the row's next token can be chosen after this chunk."""
        return self.start + self.count == len(self.row.ids)


@dataclass(frozen=True, slots=True)
class Draft:
    """The newest token of `row`, and guesses of those after it: one more can be chosen than are right."""

    row: Sequence
    guesses: tuple[int, ...]

    @property
    def count(self) -> int:
        """Tokens to run."""
        return 1 + len(self.guesses)


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """Take the first `count` positions of slot `source` over into the slot of `row` before the step."""

    source: int
    row: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copies first; rows with one token each in slot order, rows with guesses, prompt chunks."""

    decode: tuple[Sequence, ...]
    chunks: tuple[PromptChunk, ...]
    copies: tuple[PrefixCopy, ...] = ()
    ahead: tuple[Draft, ...] = ()


class Scheduler:
    """Keeps the rows; every row that waits for its prompt gets a chunk in turn, so none starves."""

    def __init__(
        self, rows: int, *, chunk_tokens: int, alone_tokens: int | None = None, guess_tokens: int = 0
    ) -> None:
        """`chunk_tokens` prompt tokens per step beside decoding rows, `alone_tokens` when none decodes.

        At most `guess_tokens` are guessed for a row in a step.
        """
        self.slots = [Slot() for _ in range(rows)]
        self._chunk_tokens = chunk_tokens
        self._alone_tokens = alone_tokens or chunk_tokens
        self._guess_tokens = guess_tokens
        self._prompts: deque[Sequence] = deque()
        self._clock = 0

    @property
    def rows(self) -> list[Sequence]:
        """The rows in flight, by slot."""
        return [slot.row for slot in self.slots if slot.row is not None]

    @property
    def used_tokens(self) -> int:
        """Positions of the cache that belong to rows in flight."""
        return sum(row.filled for row in self.rows)

    def admit(
        self, prompt_ids: tuple[int, ...], *, adapter: int | None, guess_until: int = 0, long: bool = False
    ) -> Sequence:
        """Give a free slot to a request: one that the prompt continues, else the stalest.

        What a slot holds is lost with it. So a slot is continued when the prompt shares at least half of
        it; a shorter equal beginning is copied out of it (`plan`), and the slot kept for its own.
        """
        ids = list(prompt_ids)
        free = [index for index, slot in enumerate(self.slots) if slot.row is None]
        row = Sequence(adapter, -1, ids, len(ids), guess_until, long=long)
        shared = {index: self._shared(index, row) for index in free}
        best = max(free, key=lambda index: shared[index])
        if shared[best] < max(LEAST_SHARED, len(self.slots[best].ids) / 2):
            # low slots first: rows stay close together
            best = min(free, key=lambda index: (bool(self.slots[index].ids), self.slots[index].used, index))
        kept = shared[best] if shared[best] >= LEAST_SHARED else 0
        row.slot, row.filled, row.reused = best, kept, kept
        slot = self.slots[best]
        slot.row, slot.adapter, slot.long, slot.ids = row, adapter, long, ids
        self._prompts.append(row)
        return row

    def plan(self) -> StepPlan:
        """Return what the next step runs; empty when there is no row. Changes nothing: `ran` does.

        A prompt whose beginning is being computed for another row in the same step waits, and copies it
        in the next: many requests with one long system prompt cost one pass over it.
        """
        decode = tuple(row for row in self.rows if row.decodes)
        if self._guess_tokens and not self._prompts and len(decode) <= GUESSING_ROWS:
            ahead = tuple(guess for row in decode if (guess := self._guess(row)) is not None)
            guessed = [guess.row for guess in ahead]
            return StepPlan(tuple(row for row in decode if row not in guessed), (), (), ahead)
        budget = self._chunk_tokens if decode else self._alone_tokens
        chunks: list[PromptChunk] = []
        copies: list[PrefixCopy] = []
        for row in self._prompts:
            if budget <= 0:
                break
            copy = self._best_copy(row)
            start = row.filled if copy is None else copy.count
            if _computed(chunks, row) >= start + WORTH_WAITING:
                continue
            if copy is not None:
                copies.append(copy)
            chunks.append(PromptChunk(row, start, min(budget, len(row.ids) - start)))
            budget -= chunks[-1].count
        return StepPlan(decode, tuple(chunks), tuple(copies))

    def ran(self, plan: StepPlan) -> None:
        """Note that the step is done: its tokens are in the cache.

        Prompts take turns: a row that got a chunk and is not done goes to the end of the line, so a short
        prompt behind a long one waits for one chunk, not for the whole prompt.
        """
        for row in plan.decode:
            row.filled += 1
        for guess in plan.ahead:  # a guess that is right is noted where it is accepted
            guess.row.filled += 1
        for copy in plan.copies:
            copy.row.reused = copy.count
        for chunk in plan.chunks:
            chunk.row.filled = chunk.start + chunk.count
            self._prompts.remove(chunk.row)
            if not chunk.completes:
                self._prompts.append(chunk.row)

    def retire(self, row: Sequence) -> None:
        """Free the row's slot; its contents stay for a prompt that begins alike."""
        slot = self.slots[row.slot]
        self._clock += 1
        slot.row, slot.used = None, self._clock
        slot.ids = row.ids[: row.filled]
        if row in self._prompts:
            self._prompts.remove(row)

    def forget(self, adapter: int | None = None, *, everything: bool = False) -> None:
        """Let no later row reuse what was computed under `adapter`, or anything at all."""
        for slot in self.slots:
            if slot.row is None and (everything or slot.adapter == adapter):
                slot.ids, slot.adapter = [], None

    def _guess(self, row: Sequence) -> Draft | None:
        # the last token is chosen and never run
        most = min(self._guess_tokens, row.guess_until - len(row.ids) - 1)
        guesses = row.guesser.guess(row.ids, most=most)
        return Draft(row, guesses) if guesses else None

    def _best_copy(self, row: Sequence) -> PrefixCopy | None:
        """Return the copy that saves this row most, if another slot holds enough more of its prompt."""
        shared = {index: self._shared(index, row) for index in range(len(self.slots)) if index != row.slot}
        best = max(shared, key=lambda index: shared[index], default=None)
        if best is None or shared[best] < row.filled + LEAST_SHARED:
            return None
        return PrefixCopy(best, row, shared[best])

    def _shared(self, index: int, row: Sequence) -> int:
        """Return how many tokens at the beginning of `row` slot `index` holds; never all of them."""
        slot = self.slots[index]
        if (slot.adapter, slot.long) != (row.adapter, row.long):
            return 0
        held = len(slot.ids) if slot.row is None else slot.row.filled
        return _equal(slot.ids, row.ids, most=min(held, len(row.ids) - 1))


def _computed(chunks: list[PromptChunk], row: Sequence) -> int:
    """Return how much of the beginning of `row` the slots of `chunks` will hold after their step."""
    return max(
        (
            _equal(chunk.row.ids, row.ids, most=min(chunk.start + chunk.count, len(row.ids) - 1))
            for chunk in chunks
            if (chunk.row.adapter, chunk.row.long) == (row.adapter, row.long)
        ),
        default=0,
    )


def _equal(one: list[int], other: list[int], *, most: int) -> int:
    """Return the length of the common beginning, up to `most`."""
    if one[:most] == other[:most]:
        return most
    return next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
