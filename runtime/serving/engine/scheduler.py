"""Decides what one step runs: every decoding sequence, then chunks of prompts within a token budget.

A sequence is one request with its extents of the key-value pool (pool_map.py); where they can no longer grow,
the youngest sequence is put off and computed again. One that decodes alone runs draft tokens with its newest
one (prompt_lookup.py). Pure Python over numbers: does not know tensors, threads or why an answer ends. Start
at `Scheduler.plan`.
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field, replace

from runtime.memory.pool import scored_tokens
from runtime.serving.engine.extents import Extent, Move
from runtime.serving.engine.pool_map import ArenaSize, PoolMap
from runtime.serving.engine.prompt_lookup import PromptLookup

MIN_PREFIX_TOKENS = 8
"""Common prefixes below this many tokens are not worth copying."""
LEAST_ROOM = 64
"""A sequence begins with room for so many tokens more than it has, or half as many as it has."""
DEFER_TOKENS = 64
"""A prompt waits for a step that computes this many further tokens of its prefix for another sequence."""
MAX_DRAFTING_SEQUENCES = 1
"""Up to this many sequences decode with drafts: on a CPU two gain 3 % and four lose 5 % (RESULTS.md)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the pool; as prefix cache also after its end."""

    adapter: int | None
    """Version of the adapter, never used twice: equal tokens have equal keys and values only under one."""
    ids: list[int]
    """Prompt and what was generated so far; the newest may be one that only the device has, which is below 0
    (`HostBatch.ids`)."""
    prompt_tokens: int
    most: int
    """Tokens that it has at its end, at most."""
    order: int = 0
    """Of admission."""
    extents: list[Extent] = field(default_factory=list)
    """Where its keys and values are, by kind of layer."""
    draft_until: int = 0
    """No drafts once `ids` has this length."""
    filled: int = 0
    """How many of `ids` have their keys and values in the pool."""
    reused: int = 0
    """How many of these were in the pool before and were not computed."""
    shares: bool = True
    """Whether it may reuse what others computed."""
    long: bool = False
    """Whether its positions are rotated by the factors for long contexts, which give other keys."""
    in_prompt: bool = True
    """Whether it runs chunks: of its prompt, and of what it generated before it was put off."""
    scores: int = 0
    """Tokens, from the first on, after which the log probability of the next one is wanted."""
    scored: int = 0
    """How many of these have it."""
    lookup: PromptLookup = field(default_factory=PromptLookup)
    beginning: tuple[object, ...] = ()
    """What sequences with a common prefix have in common."""

    def __post_init__(self) -> None:
        self.beginning = (self.adapter, self.long, *self.ids[:MIN_PREFIX_TOKENS])

    @property
    def decodes(self) -> bool:
        """Whether exactly the newest token is left to run, and another is to follow it."""
        return not self.in_prompt and len(self.ids) < self.most


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

    @property
    def scored(self) -> range:
        """The positions after which the log probability of the next token is wanted."""
        return range(max(self.start, self.sequence.scored), min(self.end, self.sequence.scores))


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
class StepPlan:
    """One step: one token of each decoding sequence, the oldest first, drafts, prompt chunks."""

    decode: tuple[Sequence, ...]
    chunks: tuple[PromptChunk, ...]
    drafts: tuple[Draft, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it runs nothing."""
        return not (self.decode or self.drafts or self.chunks)

    def keep(self, stays: Callable[[Sequence], bool]) -> "StepPlan":
        """Return this plan with those of its decoding sequences that `stays` says."""
        decode = tuple(filter(stays, self.decode))
        return self if len(decode) == len(self.decode) else replace(self, decode=decode)


class Scheduler:
    """Keeps the sequences; those with a prompt to run get chunks in turn, so none starves."""

    def __init__(
        self,
        sizes: Sized[ArenaSize],
        *,
        max_sequences: int,
        chunk_tokens: int,
        prefill_only_tokens: int | None = None,
        draft_tokens: int = 0,
    ) -> None:
        """`sizes` are of the pool's arenas, by kind of layer.

        `chunk_tokens` prompt tokens run in a step beside decoding ones, `prefill_only_tokens` without any. At
        most `draft_tokens` are drafted for a sequence in a step.
        """
        self._chunk_tokens = chunk_tokens
        self._prefill_only_tokens = prefill_only_tokens or chunk_tokens
        self._draft_tokens = draft_tokens
        self._scored_tokens = scored_tokens(max_sequences)
        self._max_sequences = max_sequences
        most_run = max(chunk_tokens, self._prefill_only_tokens, draft_tokens + 1)
        self._pool: PoolMap[Sequence] = PoolMap(sizes, most_run=most_run)
        self._orders = itertools.count()
        self.sequences: list[Sequence] = []
        """Those in the pool, the oldest first."""
        self.put_off: deque[Sequence] = deque()
        """Those that gave up their room, the oldest first; all are younger than those in the pool."""
        self._prompts: deque[Sequence] = deque()
        self.preemptions = 0
        """How often a sequence was put off."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that there is room for."""
        return self._pool.longest

    @property
    def used_share(self) -> float:
        """Part of the pool that sequences in flight occupy; may be read from any thread."""
        return self._pool.used_share

    def admit(  # noqa: PLR0913 - what is known of one sequence
        self,
        prompt_ids: Sized[int],
        *,
        adapter: int | None,
        most: int,
        drafts: bool = False,
        long: bool = False,
        scores: bool = False,
    ) -> Sequence | None:
        """Return a sequence for a request of `most` tokens in all, at most; None while there is no room.

        One that `scores` its prompt computes all of it, as the cache holds no logits. It has room for its
        prompt and some tokens more. It continues the extents of an ended sequence where it shares at least
        half of that; a shorter common prefix is copied (`plan`), and the other kept.
        """
        if self.put_off or len(self.sequences) >= self._max_sequences:
            return None
        sequence = Sequence(adapter, list(prompt_ids), len(prompt_ids), most, next(self._orders), long=long)
        sequence.draft_until = most if drafts else 0
        if scores:
            sequence.scores, sequence.shares = len(prompt_ids) - 1, False
        return sequence if self._place(sequence) else None

    def plan(self, most_tokens: Callable[[int], int] = lambda _: sys.maxsize) -> StepPlan:
        """Return what the next step runs; empty when there is no sequence. `take_moves` must run before it.

        A prompt whose prefix is being computed for another sequence in the same step waits, and copies it
        in the next: many requests with one long system prompt cost one pass over it. `most_tokens` says how
        many prompt tokens a pass may run that reads so many positions.
        """
        while self.put_off and self._place(self.put_off[0]):
            self.put_off.popleft()
        for sequence in tuple(self.sequences):
            if sequence.decodes:
                self._secure(sequence, 1)
        decode = tuple(sequence for sequence in self.sequences if sequence.decodes)
        if self._draft_tokens and not self._prompts and len(decode) <= MAX_DRAFTING_SEQUENCES:
            drafts = tuple(draft for sequence in decode if (draft := self._draft(sequence)) is not None)
            drafted = [draft.sequence for draft in drafts]
            return StepPlan(tuple(each for each in decode if each not in drafted), (), drafts)
        budget = self._chunk_tokens if decode else self._prefill_only_tokens
        chunks: list[PromptChunk] = []
        for sequence in tuple(self._prompts):
            if budget <= 0:
                break
            chunk = self._chunk(sequence, chunks, budget, most_tokens)
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.count
        return StepPlan(decode, tuple(chunks))

    @property
    def may_draft(self) -> bool:
        """Whether the next step may run drafts, for which all tokens must be known."""
        if not self._draft_tokens or self._prompts:
            return False
        decoding = [each for each in self.sequences if each.decodes]
        return len(decoding) <= MAX_DRAFTING_SEQUENCES and any(
            self._most_drafts(each) > 0 and not each.lookup.pauses(len(each.ids)) for each in decoding
        )

    def take_moves(self) -> tuple[Move, ...]:
        """Return what is to be copied within the pool before the next step, in this order."""
        moves, self._pool.moves = tuple(self._pool.moves), []
        return moves

    def commit(self, plan: StepPlan) -> None:
        """Note that the step of `plan` has run: its tokens are in the pool.

        Prompts take turns: a sequence that got a chunk and has more of its prompt left goes to the end of
        the queue, so a short prompt behind a long one waits for one chunk, not for the whole prompt.
        """
        for sequence in plan.decode:
            sequence.filled += 1
        for draft in plan.drafts:  # accepted draft tokens are counted where they are accepted
            draft.sequence.filled += 1
        for chunk in plan.chunks:
            chunk.sequence.filled = chunk.end
            chunk.sequence.scored += len(chunk.scored)
            self._prompts.remove(chunk.sequence)
            if chunk.completes:
                chunk.sequence.in_prompt = False
            else:
                self._prompts.append(chunk.sequence)

    def release(self, sequence: Sequence) -> None:
        """End `sequence`; its keys and values stay for a prompt with the same prefix while there is room."""
        if sequence in self.put_off:
            self.put_off.remove(sequence)
            return
        self._leave(sequence)
        if sequence.filled < MIN_PREFIX_TOKENS:
            self._pool.drop(sequence)
        else:
            sequence.ids = sequence.ids[: sequence.filled]
            self._pool.end(sequence)

    def invalidate(self, adapter: int | None = None, *, everything: bool = False) -> None:
        """Let no later sequence reuse what was computed under `adapter`, or anything at all."""
        for ended in self._ended():
            if everything or ended.adapter == adapter:
                self._pool.drop(ended)

    def restart(self, sequence: Sequence) -> None:
        """Compute all of a sequence again, by itself, and offer no other what it may have reused."""
        for ended in self._ended():
            if ended.beginning == sequence.beginning:
                self._pool.drop(ended)
        sequence.shares = False
        if sequence not in self.put_off:
            self._put_off(sequence)

    def _place(self, sequence: Sequence) -> bool:
        """Give a sequence its extents, also those of an ended one that it continues; False without room."""
        tokens = len(sequence.ids)
        tokens = min(max(sequence.most, tokens), tokens + max(LEAST_ROOM, tokens // 2))
        if not self._pool.could_place(tokens):
            return False
        best, shared = self._best(sequence, self._ended())
        continues = best is not None and shared >= max(MIN_PREFIX_TOKENS, len(best.ids) / 2)
        # where there is no room beside it, it is better continued than lost
        if best is not None and (continues or not self._pool.place(sequence, tokens, keep=best)):
            self._pool.take_over(sequence, best)
            sequence.filled = sequence.reused = shared
            self._pool.widen(sequence, tokens)
        elif best is None:
            self._pool.place(sequence, tokens)
        sequence.in_prompt = True
        self.sequences.append(sequence)
        self._prompts.append(sequence)
        return True

    def _leave(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        if sequence.in_prompt:
            self._prompts.remove(sequence)

    def _put_off(self, sequence: Sequence) -> None:
        """Take its room from a sequence, which is computed again once there is room."""
        self._leave(sequence)
        self._pool.drop(sequence)
        sequence.filled = sequence.reused = 0
        self.put_off.appendleft(sequence)

    def _secure(self, sequence: Sequence, count: int) -> bool:
        """Have room for `count` further tokens of a sequence, or put off the youngest until there is.

        False where that was the sequence itself.
        """
        while sequence.extents and not self._pool.reserve(sequence, count):
            self._put_off(self.sequences[-1])
            self.preemptions += 1
        return bool(sequence.extents)

    def _chunk(
        self, sequence: Sequence, others: list[PromptChunk], budget: int, most_tokens: Callable[[int], int]
    ) -> PromptChunk | None:
        """Return what of the prompt of `sequence` runs beside the chunks of `others`; None when it waits."""
        source, start = self._best(sequence, (*self.sequences, *self._ended()))
        if source is None or start < sequence.filled + MIN_PREFIX_TOKENS:
            source, start = None, sequence.filled
        if sequence.shares and _prefix_after(others, sequence) >= start + DEFER_TOKENS:
            return None
        count = min(budget, len(sequence.ids) - start)
        count = min(count, most_tokens(start + count) - sum(chunk.count for chunk in others))
        scored = len(PromptChunk(sequence, start, count).scored)
        count -= max(0, scored + sum(len(chunk.scored) for chunk in others) - self._scored_tokens)
        if count <= 0:
            return None
        if source is not None:
            self._pool.copy(source, sequence, start)
            sequence.reused += start - sequence.filled
            sequence.filled = start
            if source not in self.sequences:
                self._pool.touch(source)
        return PromptChunk(sequence, start, count) if self._secure(sequence, count) else None

    def _draft(self, sequence: Sequence) -> Draft | None:
        if sequence.ids[-1] < 0:  # nothing is known to follow it
            return None
        tokens = sequence.lookup.draft(sequence.ids, most=self._most_drafts(sequence))
        if not tokens or not self._pool.reserve(sequence, 1 + len(tokens)):
            return None
        return Draft(sequence, tokens)

    def _most_drafts(self, sequence: Sequence) -> int:
        # the last token is chosen and never run
        return min(self._draft_tokens, sequence.draft_until - len(sequence.ids) - 1)

    def _best(self, sequence: Sequence, among: Iterable[Sequence]) -> tuple[Sequence | None, int]:
        """Return the one that has most of the prefix of `sequence`, and how much; never all of it."""
        best, most = None, MIN_PREFIX_TOKENS - 1
        for other in among if sequence.shares else ():
            if other is not sequence and other.beginning == sequence.beginning:
                held = min(other.filled, len(sequence.ids) - 1)
                if held > most and other.ids[most] == sequence.ids[most]:  # else it has no more than the best
                    shared = _common_prefix(other.ids, sequence.ids, most=held)
                    if shared > most and self._pool.holds(other, shared):
                        best, most = other, shared
        return best, most if best is not None else 0

    def _ended(self) -> tuple[Sequence, ...]:
        return tuple(self._pool.ended)


def _prefix_after(chunks: list[PromptChunk], sequence: Sequence) -> int:
    """Return how much of the prefix of `sequence` the extents of `chunks` will hold after their step."""
    return max(
        (
            _common_prefix(chunk.sequence.ids, sequence.ids, most=min(chunk.end, len(sequence.ids) - 1))
            for chunk in chunks
            if chunk.sequence.beginning == sequence.beginning
        ),
        default=0,
    )


def _common_prefix(one: list[int], other: list[int], *, most: int) -> int:
    """Return the length of the common prefix of two lists, up to `most`."""
    if one[:most] == other[:most]:
        return most
    # of slices twice as long each, the first that differs is halved
    low, step = 0, MIN_PREFIX_TOKENS
    while one[low : low + step] == other[low : low + step]:
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if one[low : low + step] == other[low : low + step]:
            low += step
    return low
