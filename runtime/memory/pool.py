"""The size of a server's key-value pool: positions for each kind of layer in the memory that is free.

One arena holds the positions of all layers of a kind: those that see every token, and those that see a window
of the last ones. Sequences share an arena, so what is planned is tokens, not sequences of one length. Does
not know devices, models or requests. Start at `pool_that_fits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import CapacityError

CACHE_SHARE = 0.8
"""Part of the memory left beside the weights that keys and values may take; the rest is for a step's work."""
SAMPLING_BYTES = 28
"""For each row that is drawn and token of the vocabulary: logits, scores, shares, products and sums, and
the logits of the step before, which a step ahead of its tokens keeps."""
SCORED_TOKENS = 32
"""Prompt tokens whose log probabilities a step works out; as many as there are rows, where these are more."""
LEAST_TOKENS = 16
"""No sequence is served with less."""
STEP_TOKENS = 512
"""Most tokens of one sequence in a step of the engine."""


@dataclass(frozen=True, slots=True)
class ArenaKind:
    """Layers that keep the same positions."""

    token_bytes: int
    """Keys and values of one position, all layers of the kind together."""
    window: int | None = None
    """A token sees so many positions, itself included; None sees all."""
    span: int | None = None
    """Positions of a sequence that are kept at most; None keeps all."""

    def of(self, tokens: int) -> int:
        """Return the positions that a sequence of `tokens` takes."""
        return tokens if self.span is None else min(tokens, self.span)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What a pool has room for."""

    rows: int
    """Sequences at the same time, at most."""
    context_tokens: int
    """Prompt and answer of one sequence together, at most."""
    positions: tuple[int, ...]
    """Of all sequences together, by kind of layer."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together that fit, as long as no window is full."""
        return min(self.positions, default=self.rows * self.context_tokens)


def window_span(window: int, most_run: int = STEP_TOKENS) -> int:
    """Return how many positions of a sequence the engine keeps where tokens see a `window`.

    A step of `most_run` tokens reads the window before its first one; what is beyond that spares copies.
    """
    return window + max(most_run, window // 4)


def sampling_bytes(rows: int, vocabulary: int) -> int:
    """Return what choosing the tokens of `rows` takes at the most, with a vocabulary of so many tokens.

    Log probabilities of prompts, which a step works out before it chooses, take less for each token.
    """
    return scored_tokens(rows) * vocabulary * SAMPLING_BYTES


def scored_tokens(rows: int) -> int:
    """Return the prompt tokens whose log probabilities a step of `rows` works out at most."""
    return max(rows, SCORED_TOKENS)


def beside(work_bytes: int, free_bytes: int) -> int:
    """Return how much of `free_bytes` a pool is fitted into, so that `work_bytes` are left for a step's work.

    At most half: where all rows together find no memory they are chosen one by one.
    """
    left = free_bytes - min(work_bytes, free_bytes // 2)
    return min(free_bytes, int(left / CACHE_SHARE))


def pool_that_fits(
    kinds: Sequence[ArenaKind], *, rows: int, context_tokens: int, free_bytes: int, sequence_bytes: int = 0
) -> PoolSize:
    """Return the pool for up to `rows` sequences of up to `context_tokens` in CACHE_SHARE of `free_bytes`.

    All kinds get equally many positions, none more than `rows` sequences could use; but where one sequence
    of the whole context would not fit so, windows give way. The context gives way where nothing else does.
    `sequence_bytes` are the states that each sequence has beside. Raises CapacityError when not even a short
    sequence fits.
    """
    budget = max(0, int(free_bytes * CACHE_SHARE) - rows * sequence_bytes)
    most = [rows * kind.of(context_tokens) for kind in kinds]
    positions = _level(kinds, most, budget)
    longest = _longest(kinds, context_tokens, budget)
    if any(count < kind.of(longest) for kind, count in zip(kinds, positions, strict=True)):
        least = [kind.of(longest) for kind in kinds]
        left = budget - sum(kind.token_bytes * count for kind, count in zip(kinds, least, strict=True))
        further = _level(kinds, [max(0, up - low) for up, low in zip(most, least, strict=True)], left)
        positions = [low + more for low, more in zip(least, further, strict=True)]
    if longest < min(LEAST_TOKENS, context_tokens):
        needed = sum(kind.token_bytes * kind.of(LEAST_TOKENS) for kind in kinds)
        raise CapacityError(
            f"{free_bytes >> 20} MiB are free beside the weights, and one sequence of {LEAST_TOKENS} tokens "
            f"needs {needed + sequence_bytes >> 20} MiB of keys and values; use a larger device or a "
            "quantised model"
        )
    return PoolSize(rows, longest, tuple(positions))


def _longest(kinds: Sequence[ArenaKind], limit: int, budget: int) -> int:
    """Return the longest sequence, up to `limit`, whose positions take at most `budget` bytes."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(kind.token_bytes * kind.of(middle) for kind in kinds) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _level(kinds: Sequence[ArenaKind], most: Sequence[int], budget: int) -> list[int]:
    """Return equally many positions for all kinds, up to `most` of each, that take at most `budget` bytes."""
    positions = [0] * len(kinds)
    open_kinds = sorted(range(len(kinds)), key=lambda index: most[index])
    level = 0
    while open_kinds:
        width = sum(kinds[index].token_bytes for index in open_kinds)
        rise = min(most[open_kinds[0]] - level, max(0, budget) // width)
        level, budget = level + rise, budget - rise * width
        for index in open_kinds:
            positions[index] = level
        if level < most[open_kinds[0]]:
            break
        open_kinds.pop(0)
    return positions
