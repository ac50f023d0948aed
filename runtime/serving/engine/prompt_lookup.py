"""Guesses what a row says next from what it holds already: prompt lookup, speculation without a second model.

Answers repeat their prompts and themselves: names, quoted text, code, lists. Where the newest tokens stood
before, what followed them there is the guess; the model checks all of it in one pass, which a few rows leave
room for. A guess decides when a token is computed, never which one is chosen (arXiv:2211.17192, where the
guess is certain). Does not know models. Start at `PromptLookup.guess`.
"""

from array import array

TAILS = (3, 2)
"""How many of the newest tokens must have stood before, in the order they are looked for."""
WIDTH = 4
"""Tokens guessed at first; a guess that was right to its end doubles the next."""
LONGEST_REST = 64
"""Most tokens without a guess, after guesses that were wrong."""
_CODE = "i"
_BYTES = array(_CODE).itemsize


class PromptLookup:
    """The guesses for one row."""

    __slots__ = ("_held", "_misses", "_rests_until", "_width")

    def __init__(self) -> None:
        self._held = bytearray()  # the row's ids, for a search in C
        self._width, self._misses, self._rests_until = WIDTH, 0, 0

    def guess(self, ids: list[int], *, most: int) -> tuple[int, ...]:
        """Return up to `most` tokens that may follow `ids`, which only grows from call to call."""
        if most <= 0 or len(ids) < self._rests_until:
            return ()
        self._held += array(_CODE, ids[len(self._held) // _BYTES :]).tobytes()
        for tail in TAILS:
            after = self._find(tail)
            if after is not None:
                return tuple(ids[after : after + min(self._width, most)])
        return ()

    def learn(self, *, guessed: int, right: int, length: int) -> None:
        """Note how much of a guess was right, of a row that has `length` ids by now."""
        self._width = 2 * self._width if right == guessed else WIDTH
        self._misses = 0 if right else self._misses + 1
        self._rests_until = length + min(2**self._misses, LONGEST_REST) if self._misses else 0

    def _find(self, tail: int) -> int | None:
        """Return the place behind the latest earlier occurrence of the last `tail` tokens."""
        wanted, end = self._held[-tail * _BYTES :], len(self._held) - _BYTES
        while (place := self._held.rfind(wanted, 0, end)) >= 0:
            if place % _BYTES == 0:
                return place // _BYTES + tail
            end = place + len(wanted) - 1
        return None
