"""Prompt-lookup speculative decoding: draft tokens from the sequence itself, without a second model.

Answers repeat their prompts and themselves: names, quoted text, code, lists. Where the newest tokens occurred
before, what followed them there is the draft; the model checks all of it in one pass, for which a step of few
sequences has room. A draft decides when a token is computed, never which one is chosen (arXiv:2211.17192,
with a draft of probability 1). Does not know models. Start at `PromptLookup.draft`.
"""

from array import array

NGRAM_SIZES = (3, 2)
"""How many of the newest tokens must have occurred before, in the order they are searched for."""
FIRST_DRAFT_TOKENS = 4
"""Length of the first draft; one that is accepted to its end doubles the next."""
MAX_PAUSE_TOKENS = 64
"""Most tokens without a draft after drafts that were rejected."""
_CODE = "i"
_BYTES = array(_CODE).itemsize


class PromptLookup:
    """The drafts for one sequence."""

    __slots__ = ("_held", "_pause_until", "_rejections", "_width")

    def __init__(self) -> None:
        self._held = bytearray()  # the sequence's ids, for a search in C
        self._width, self._rejections, self._pause_until = FIRST_DRAFT_TOKENS, 0, 0

    def draft(self, ids: list[int], *, most: int) -> tuple[int, ...]:
        """Return up to `most` tokens that may follow `ids`, which only grows from call to call."""
        if most <= 0 or self.pauses(len(ids)):
            return ()
        self._held += array(_CODE, ids[len(self._held) // _BYTES :]).tobytes()
        for size in NGRAM_SIZES:
            after = self._find(size)
            if after is not None:
                return tuple(ids[after : after + min(self._width, most)])
        return ()

    def pauses(self, length: int) -> bool:
        """Whether a sequence of `length` ids gets no draft, as those before were rejected."""
        return length < self._pause_until

    def record(self, *, drafted: int, accepted: int, length: int) -> None:
        """Note how much of a draft was accepted, for a sequence that has `length` ids by now."""
        self._width = 2 * self._width if accepted == drafted else FIRST_DRAFT_TOKENS
        self._rejections = 0 if accepted else self._rejections + 1
        self._pause_until = length + min(2**self._rejections, MAX_PAUSE_TOKENS) if self._rejections else 0

    def _find(self, size: int) -> int | None:
        """Return the index after the latest earlier occurrence of the last `size` tokens."""
        wanted, end = self._held[-size * _BYTES :], len(self._held) - _BYTES
        while (place := self._held.rfind(wanted, 0, end)) >= 0:
            if place % _BYTES == 0:
                return place // _BYTES + size
            end = place + len(wanted) - 1
        return None
