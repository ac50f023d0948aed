"""Decides what one step runs: every decoding sequence, then chunks of prompts within a token budget.

A sequence is one request in a slot of the key-value cache. A sequence that decodes alone runs draft tokens
with its newest one (prompt_lookup.py). Pure Python over numbers: does not know tensors, threads or why an
answer ends. Start at `Scheduler.plan`.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.serving.engine.extents import Extent
from runtime.serving.engine.prompt_lookup import PromptLookup

MIN_PREFIX_TOKENS = 8
"""Common prefixes below this many tokens are not worth copying."""
DEFER_TOKENS = 64
"""A prompt waits for a step that computes this many further tokens of its prefix for another sequence."""
MAX_DRAFTING_SEQUENCES = 1
"""Up to this many sequences decode with drafts: on a CPU two gain 3 % and four lose 5 % (RESULTS.md)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in its slot."""

    adapter: int | None
    """Version of the adapter, never used twice: equal tokens have equal keys and values only under one."""
    slot: int
    ids: list[int]
    """Prompt and what was generated so far."""
    prompt_tokens: int
    extents: list[Extent] = field(default_factory=list)
    """Where its keys and values are, by kind of layer."""
    draft_until: int = 0
    """No drafts once `ids` has this length."""
    filled: int = 0
    """How many of `ids` have their keys and values in the slot."""
    reused: int = 0
    """How many of these were in the cache before and were not computed."""
    long: bool = False
    """Whether its positions are rotated by the factors for long contexts, which give other keys."""
    lookup: PromptLookup = field(default_factory=PromptLookup)

    @property
    def decodes(self) -> bool:
        """Whether exactly the newest token is left to run."""
        return self.filled == len(self.ids) - 1 and len(self.ids) > self.prompt_tokens


@dataclass(slots=True)
class Slot:
    """What a slot of the cache holds, also after its sequence has ended."""

    ids: list[int] = field(default_factory=list)
    adapter: int | None = None
    long: bool = False
    sequence: Sequence | None = None
    used: int = 0
    """Clock of the last release, to reuse the slot that was idle longest."""


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """`count` prompt tokens of `sequence`, from position `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be chosen after this chunk."""
        return self.end == len(self.sequence.ids)

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Draft:
    """The newest token of `sequence` and draft `tokens` after it: one more can be chosen than is accepted."""

    sequence: Sequence
    tokens: tuple[int, ...]

    @property
    def count(self) -> int:
        """Tokens to run."""
        return 1 + len(self.tokens)


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """Copy the first `count` positions of slot `source` into the slot of `sequence` before the step."""

    source: int
    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copies first; one token of each decoding sequence in slot order, drafts, prompt chunks."""

    decode: tuple[Sequence, ...]
    chunks: tuple[PromptChunk, ...]
    copies: tuple[PrefixCopy, ...] = ()
    drafts: tuple[Draft, ...] = ()


class Scheduler:
    """Keeps the sequences; those with a prompt to run get chunks in turn, so none starves."""

    def __init__(
        self,
        max_sequences: int,
        *,
        chunk_tokens: int,
        prefill_only_tokens: int | None = None,
        draft_tokens: int = 0,
    ) -> None:
        """`chunk_tokens` prompt tokens per step beside decoding ones, `prefill_only_tokens` without any.

        At most `draft_tokens` are drafted for a sequence in a step.
        """
        self.slots = [Slot() for _ in range(max_sequences)]
        self._chunk_tokens = chunk_tokens
        self._prefill_only_tokens = prefill_only_tokens or chunk_tokens
        self._draft_tokens = draft_tokens
        self._prompts: deque[Sequence] = deque()
        self._clock = 0

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences in flight, by slot."""
        return [slot.sequence for slot in self.slots if slot.sequence is not None]

    @property
    def used_tokens(self) -> int:
        """Positions of the cache that belong to sequences in flight."""
        return sum(sequence.filled for sequence in self.sequences)

    def admit(
        self, prompt_ids: tuple[int, ...], *, adapter: int | None, draft_until: int = 0, long: bool = False
    ) -> Sequence:
        """Give a free slot to a request: one that the prompt continues, else the one idle longest.

        The slot's former contents are lost. So a slot is continued when the prompt shares at least half of
        it; a shorter common prefix is copied out of it (`plan`), and the slot kept for a prompt of its own.
        """
        ids = list(prompt_ids)
        free = [index for index, slot in enumerate(self.slots) if slot.sequence is None]
        sequence = Sequence(adapter, -1, ids, len(ids), draft_until, long=long)
        shared = {index: self._shared(index, sequence) for index in free}
        best = max(free, key=lambda index: shared[index])
        if shared[best] < max(MIN_PREFIX_TOKENS, len(self.slots[best].ids) / 2):
            # low slots first: sequences stay close together
            best = min(free, key=lambda index: (bool(self.slots[index].ids), self.slots[index].used, index))
        kept = shared[best] if shared[best] >= MIN_PREFIX_TOKENS else 0
        sequence.slot, sequence.filled, sequence.reused = best, kept, kept
        slot = self.slots[best]
        slot.sequence, slot.adapter, slot.long, slot.ids = sequence, adapter, long, ids
        self._prompts.append(sequence)
        return sequence

    def plan(self, most_tokens: Callable[[int], int] = lambda _: sys.maxsize) -> StepPlan:
        """Return what the next step runs; empty when there is no sequence. Changes nothing: `commit` does.

        A prompt whose prefix is being computed for another sequence in the same step waits, and copies it
        in the next: many requests with one long system prompt cost one pass over it. `most_tokens` says how
        many prompt tokens a pass may run that reads so many positions.
        """
        decode = tuple(sequence for sequence in self.sequences if sequence.decodes)
        if self._draft_tokens and not self._prompts and len(decode) <= MAX_DRAFTING_SEQUENCES:
            drafts = tuple(draft for sequence in decode if (draft := self._draft(sequence)) is not None)
            drafted = [draft.sequence for draft in drafts]
            return StepPlan(tuple(each for each in decode if each not in drafted), (), (), drafts)
        budget = self._chunk_tokens if decode else self._prefill_only_tokens
        chunks: list[PromptChunk] = []
        copies: list[PrefixCopy] = []
        for sequence in self._prompts:
            if budget <= 0:
                break
            copy = self._best_copy(sequence)
            start = sequence.filled if copy is None else copy.count
            if _prefix_after(chunks, sequence) >= start + DEFER_TOKENS:
                continue
            count = min(budget, len(sequence.ids) - start)
            count = min(count, most_tokens(start + count) - sum(chunk.count for chunk in chunks))
            if count <= 0:
                continue
            if copy is not None:
                copies.append(copy)
            chunks.append(PromptChunk(sequence, start, count))
            budget -= count
        return StepPlan(decode, tuple(chunks), tuple(copies))

    def commit(self, plan: StepPlan) -> None:
        """Note that the step of `plan` has run: its tokens are in the cache.

        Prompts take turns: a sequence that got a chunk and has more of its prompt left goes to the end of
        the queue, so a short prompt behind a long one waits for one chunk, not for the whole prompt.
        """
        for sequence in plan.decode:
            sequence.filled += 1
        for draft in plan.drafts:  # accepted draft tokens are counted where they are accepted
            draft.sequence.filled += 1
        for copy in plan.copies:
            copy.sequence.reused = copy.count
        for chunk in plan.chunks:
            chunk.sequence.filled = chunk.start + chunk.count
            self._prompts.remove(chunk.sequence)
            if not chunk.completes:
                self._prompts.append(chunk.sequence)

    def release(self, sequence: Sequence) -> None:
        """Free the slot of `sequence`; its contents stay for a prompt with the same prefix."""
        slot = self.slots[sequence.slot]
        self._clock += 1
        slot.sequence, slot.used = None, self._clock
        slot.ids = sequence.ids[: sequence.filled]
        if sequence in self._prompts:
            self._prompts.remove(sequence)

    def invalidate(self, adapter: int | None = None, *, everything: bool = False) -> None:
        """Let no later sequence reuse what was computed under `adapter`, or anything at all."""
        for slot in self.slots:
            if slot.sequence is None and (everything or slot.adapter == adapter):
                slot.ids, slot.adapter = [], None

    def _draft(self, sequence: Sequence) -> Draft | None:
        # the last token is chosen and never run
        most = min(self._draft_tokens, sequence.draft_until - len(sequence.ids) - 1)
        tokens = sequence.lookup.draft(sequence.ids, most=most)
        return Draft(sequence, tokens) if tokens else None

    def _best_copy(self, sequence: Sequence) -> PrefixCopy | None:
        """Return the copy that saves this sequence most, if another slot holds enough more of its prompt."""
        others = (index for index in range(len(self.slots)) if index != sequence.slot)
        shared = {index: self._shared(index, sequence) for index in others}
        best = max(shared, key=lambda index: shared[index], default=None)
        if best is None or shared[best] < sequence.filled + MIN_PREFIX_TOKENS:
            return None
        return PrefixCopy(best, sequence, shared[best])

    def _shared(self, index: int, sequence: Sequence) -> int:
        """Return how many tokens of the prefix of `sequence` slot `index` holds; never all of them."""
        slot = self.slots[index]
        if (slot.adapter, slot.long) != (sequence.adapter, sequence.long):
            return 0
        held = len(slot.ids) if slot.sequence is None else slot.sequence.filled
        return _common_prefix(slot.ids, sequence.ids, most=min(held, len(sequence.ids) - 1))


def _prefix_after(chunks: list[PromptChunk], sequence: Sequence) -> int:
    """Return how much of the prefix of `sequence` the slots of `chunks` will hold after their step."""
    return max(
        (
            _common_prefix(
                chunk.sequence.ids,
                sequence.ids,
                most=min(chunk.start + chunk.count, len(sequence.ids) - 1),
            )
            for chunk in chunks
            if (chunk.sequence.adapter, chunk.sequence.long) == (sequence.adapter, sequence.long)
        ),
        default=0,
    )


def _common_prefix(one: list[int], other: list[int], *, most: int) -> int:
    """Return the length of the common prefix of two lists, up to `most`."""
    if one[:most] == other[:most]:
        return most
    pairs = zip(one, other, strict=False)
    return next(index for index, pair in enumerate(pairs) if pair[0] != pair[1])
