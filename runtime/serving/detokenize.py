"""From token ids to text, token by token: what can be sent now, and what must be held back.

Two things are held back: bytes of an unfinished character (an emoji spans several tokens), and text that
may become a stop string (which may span tokens too, and is never sent). Knows ids and strings, not
engines or HTTP. Start at `TextStream.push`.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the bytes of an incomplete character to."""
TAIL_TOKENS = 6
"""Prompt tokens decoded before the answer's first one, so that its leading space survives."""
PENDING_TOKENS = 8
"""No character needs more tokens than this: what is still unfinished then is noise, and is returned."""


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
        text = self._new_text()
        pending = len(self._window) - self._shown
        if not text or (text.endswith(UNFINISHED) and pending < PENDING_TOKENS):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """Return the rest at the end of the answer, an unfinished character as U+FFFD."""
        text = self._new_text()
        self._advance()
        return text

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(before) :]

    def _advance(self) -> None:
        self._window = self._window[self._shown :] or self._window
        self._shown = len(self._window)


class StopScanner:
    """Finds the first stop string in text that arrives in chunks, holding back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.after = ""
        """What followed the stop string in the chunk that completed it."""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to send, and whether a stop string ends the answer there."""
        text = self._held + text
        matches = [(text.find(stop), len(stop)) for stop in self._stops if stop in text]
        if matches:
            start, length = min(matches)
            self._held, self.after = "", text[start + length :]
            return text[:start], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text held back, at the end of the answer."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Turns one answer's tokens into text: `push` each, then `finish`."""

    def __init__(self, decode: Decode, *, stops: Sequence[str] = (), tail: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode, tail)
        self._scanner = StopScanner(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text to send after `token`, and whether a stop string was met."""
        return self._scanner.push(self._detokenizer.push(token))

    def finish(self) -> tuple[str, bool]:
        """Return the text still to send, and whether a stop string was met in it."""
        text, met = self._scanner.push(self._detokenizer.flush())
        return (text, True) if met else (text + self._scanner.flush(), False)
