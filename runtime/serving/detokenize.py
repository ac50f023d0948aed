"""From token ids to text, piece by piece: what a client may be shown now, and what must wait.

Two things wait: bytes of an unfinished character (an emoji spans several tokens), and text that may
become a stop string (which may span tokens too, and is never shown). Knows ids and strings, not
engines or HTTP. Start at `TextStream.push`.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"
"""What a tokenizer decodes bytes to that are no whole character (yet)."""
TAIL_TOKENS = 6
"""Prompt tokens decoded before the answer's first one, so that its leading space survives."""
PENDING_TOKENS = 8
"""No character needs more tokens than this: what is still unfinished then is noise, and is shown."""


class Detokenizer:
    """Decodes a growing list of tokens; the pieces joined are the decoded whole.

    Decoding token by token would lose spaces (sentencepiece) and break characters, and decoding the
    whole list each time is quadratic. So a short window is decoded with and without the new tokens,
    and the difference is the piece.
    """

    def __init__(self, decode: Decode, tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(tail)  # tokens whose text is out, then the pending ones
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
        """Return what is left at the end of the answer, an unfinished character as U+FFFD."""
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
    """Finds the first of some strings in text that comes in pieces, holding back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.after = ""
        """What followed the stop string in the piece that held it."""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string ends the answer there."""
        text = self._held + text
        found = [(text.find(stop), len(stop)) for stop in self._stops if stop in text]
        if found:
            at, length = min(found)
            self._held, self.after = "", text[at + length :]
            return text[:at], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text held back, once it is known that no stop string follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """One answer's tokens on their way to text: `push` each, then `finish`."""

    def __init__(self, decode: Decode, *, stops: Sequence[str] = (), tail: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode, tail)
        self._scanner = StopScanner(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text to show after `token`, and whether a stop string was met."""
        return self._scanner.push(self._detokenizer.push(token))

    def finish(self) -> tuple[str, bool]:
        """Return the text still to show, and whether a stop string was met in it."""
        text, met = self._scanner.push(self._detokenizer.flush())
        return (text, True) if met else (text + self._scanner.flush(), False)
