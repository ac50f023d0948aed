"""From token ids to text, token by token: what can be sent now, and what must be held back.

Two things are held back: bytes of an unfinished character (an emoji spans several tokens), and text that
may become a stop string (which may span tokens too, and is never sent). Knows ids and strings, not
engines or HTTP. Start at `Detokenizer.push`; answer_text.py puts the two together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the bytes of an incomplete character to."""
TAIL_TOKENS = 6
"""Prompt tokens decoded before the answer's first one, so that its leading space survives."""
PENDING_TOKENS = 8
"""No character needs more tokens than this: what is still unfinished then is noise, and is returned."""
BEGUN_TOKENS = 3
"""The last tokens of noise, with which a character may begin: it has four bytes at most."""
FIRST_MARK = 0xD800
"""Half a surrogate pair, which no text and no stop string can hold, stands for a special token."""


class Detokenizer:
    """Decodes a growing list of tokens; the texts returned, joined, are the decoded list.

    Decoding token by token would lose spaces (sentencepiece) and break characters, and decoding all
    tokens each time is quadratic. So a short window is decoded with and without the new tokens, and the
    difference is returned.
    """

    def __init__(self, decode: Decode, tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(tail)  # tokens whose text was returned, then the pending ones
        self._shown = len(self._window)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, "" when it ends within a character."""
        self._window.append(token)
        end = len(self._window)
        text = self._new_text(end)
        if not text or text.endswith(UNFINISHED):
            if end - self._shown < PENDING_TOKENS:
                return ""
            # the last tokens may begin a character: where least is unfinished, none is cut in two
            ends = range(end - BEGUN_TOKENS, end + 1)
            text, end = min(((self._new_text(at), at) for at in ends), key=_unfinished)
        self._advance(end)
        return text

    def flush(self) -> str:
        """Return the rest at the end of the answer, an unfinished character as U+FFFD."""
        text = self._new_text(len(self._window))
        self._advance(len(self._window))
        return text

    def _new_text(self, end: int) -> str:
        before = self._decode(self._window[: self._shown])
        text = self._decode(self._window[:end])
        if text.startswith(before):
            return text[len(before) :]
        # with byte fallback, one byte that is no UTF-8 undoes all characters of the bytes before it
        return self._decode(self._window[self._shown : end])

    def _advance(self, end: int) -> None:
        if end > self._shown:
            self._window, self._shown = self._window[self._shown :], end - self._shown


def _unfinished(cut: tuple[str, int]) -> int:
    return cut[0].count(UNFINISHED)


@dataclass(frozen=True, slots=True)
class StopRules:
    """Which text ends an answer."""

    strings: Sequence[str] = ()
    """Empty ones are ignored."""
    included: bool = False
    """Whether the stop string is part of the answer."""
    min_tokens: int = 0
    """A stop string that ends within so many tokens does not end the answer."""


class StopScanner:
    """Finds the first stop string in text that arrives in chunks, holding back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._ignored = 0  # characters of what is held in which no stop string may end
        self.found = self.after = ""
        """The stop string that was met, and what followed it in the chunk that completed it."""

    @property
    def held(self) -> str:
        """The text that is held back."""
        return self._held

    def push(self, text: str, *, counts: bool = True) -> tuple[str, bool]:
        """Return the text that is safe to send, and whether a stop string ends the answer there.

        A stop string that ends in text that does not count is none.
        """
        text = self._held + text
        ignored = self._ignored if counts else len(text)
        places = [(text.find(stop, max(0, ignored + 1 - len(stop))), stop) for stop in self._stops]
        matches = [(start, len(stop), stop) for start, stop in places if start >= 0]
        if matches:
            start, length, self.found = min(matches)
            self._held, self.after = "", text[start + length :]
            return text[:start], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        self._ignored = max(0, ignored - (len(text) - keep))
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text held back, at the end of the answer."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def marked(delimiter: str, marks: Mapping[str, str]) -> str:
    """Return a text with the special tokens in it, the longest first, replaced by their marks."""
    for text in sorted(marks, key=len, reverse=True):
        delimiter = delimiter.replace(text, marks[text])
    return delimiter
