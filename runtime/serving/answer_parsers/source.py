"""The text of an answer while it arrives, for parsers that are written as if it were all there.

A parser is a generator: it yields parts, and `WAIT` where it needs more text than there is. So it says once
what a format looks like, and any division of the text gives the same parts. Does not know any format. Start
at `AnswerSource`, then `Cursor`.
"""

import re
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

from runtime.serving.answer_parsers.parts import Part
from runtime.serving.detokenize import marked, overlap

T = TypeVar("T")
WAIT: Literal["wait"] = "wait"
Steps = Generator[Part | Literal["wait"], None, T]
"""What a parser yields, and what it returns."""

_OPENING, _CLOSING = frozenset("[{("), frozenset("]})")
_COUNTS = re.compile(r"[\[\](){}\"'\\]")
_NO_SPACE = re.compile(r"\S")


class AnswerSource:
    """Text that has arrived and is not yet part of the answer."""

    def __init__(self, marks: Mapping[str, str] | None = None) -> None:
        """`marks` are special tokens with the characters that stand for them in the text."""
        self._marks = marks or {}
        self._unmarked = str.maketrans(dict.fromkeys(self._marks.values(), ""))
        self.text = ""
        """What has arrived; of what is taken, some may be gone."""
        self.at = 0
        """Where in it begins what is not taken."""
        self.held = 0
        """Characters that are not taken, marks left out."""
        self.ended = False
        self.taken = 0
        """Characters taken so far."""
        self.thoughts: deque[tuple[int, int]] = deque()
        """(start, end) of what was taken as reasoning."""

    def add(self, text: str) -> None:
        """Append what has arrived."""
        longer, self.text = self.text, ""  # a text that one name holds grows without a copy
        longer += text
        self.text = longer
        self.held += len(self.unmarked(text))

    def mark(self, delimiters: Sequence[str]) -> tuple[str, ...]:
        """Return delimiters as they stand in this text."""
        return tuple(marked(each, self._marks) for each in delimiters)

    def unmarked(self, text: str) -> str:
        """Return a text without special tokens."""
        return text.translate(self._unmarked) if self._marks else text

    def is_marked(self, delimiter: str) -> bool:
        """Whether a delimiter is one special token, which no text spells by chance."""
        return delimiter in self._marks

    def take(self, until: int, *, thought: bool = False) -> str:
        """Return the text up to `until`, a place in `text`, and go there. No cursor is valid after it."""
        text = self.text[self.at : until]
        start, self.taken = self.taken, self.taken + len(text)
        self.held -= len(self.unmarked(text))
        if thought and text:
            if self.thoughts and self.thoughts[-1][1] == start:
                start = self.thoughts.pop()[0]
            self.thoughts.append((start, self.taken))
        self.at = until
        if 2 * self.at >= len(self.text):  # so no character is moved more than once for each that is taken
            self.text, self.at = self.text[self.at :], 0
        return text

    def find(self, delimiters: Sequence[str], start: int | None = None) -> tuple[int, str]:
        """Return where the first delimiter stands, the longest there, and which; (-1, "") for none."""
        found = _any_of(tuple(delimiters)).search(self.text, self.at if start is None else start)
        return (found.start(), found[0]) if found else (-1, "")

    def decided(self, delimiters: Sequence[str]) -> int:
        """Return the place up to which the text, which has no delimiter, does not begin one."""
        end = len(self.text)
        if self.ended or not delimiters:
            return end
        tail = self.text[max(self.at, end - max(map(len, delimiters))) :]
        return end - max(overlap(tail, each) for each in delimiters)

    def take_before(self, delimiters: Sequence[str], *, thought: bool = False) -> tuple[str, str]:
        """Take the text before the first delimiter; return it, and which that is.

        Without one, "" and all the text that does not begin one.
        """
        place, found = self.find(delimiters)
        return self.take(place if found else self.decided(delimiters), thought=thought), found


@dataclass(slots=True)
class Cursor:
    """A place ahead in the text, for what is taken only where it is a call as a whole."""

    source: AnswerSource
    at: int
    looked: int = 0
    """The furthest place that was read."""

    def literal(self, options: Sequence[str]) -> Steps[str]:
        """Go behind the longest of `options` that stands here, and return it; "" for none."""
        while True:
            rest = self.source.text[self.at : self.at + max(map(len, options), default=0)]
            longer = not self.source.ended and any(
                len(each) > len(rest) and each.startswith(rest) for each in options
            )
            if not longer:
                found = max((each for each in options if rest.startswith(each)), key=len, default="")
                self._read(self.at + len(found))
                return found
            yield WAIT

    def space(self) -> Steps[None]:
        """Go behind white space."""
        while True:
            found = _NO_SPACE.search(self.source.text, self.at)
            self._read(found.start() if found else len(self.source.text))
            if found or self.source.ended:
                return
            yield WAIT

    def peek(self) -> Steps[str]:
        """Return the next character, "" at the end."""
        while self.at >= len(self.source.text) and not self.source.ended:
            yield WAIT
        return self.source.text[self.at : self.at + 1]

    def until(self, delimiters: Sequence[str], *, or_end: bool = False) -> Steps[tuple[str | None, str]]:
        """Go behind the first delimiter; return the text before it, and which it is.

        At the end without one, the text is None, or with `or_end` all that is left.
        """
        start, searched, longest = self.at, self.at, max(map(len, delimiters))
        while True:
            place, found = self.source.find(delimiters, searched)
            end = len(self.source.text)
            if found and (place + longest <= end or self.source.ended or _alone(tuple(delimiters))):
                self._read(place + len(found))
                return self.source.unmarked(self.source.text[start:place]), found
            if self.source.ended:
                self._read(end)
                if or_end:
                    return self.source.unmarked(self.source.text[start:]), ""
                self.at = start
                return None, ""
            if not found:
                searched = max(start, end - longest + 1)
            yield WAIT

    def bracketed(self, quotes: str = '"') -> Steps[str]:
        """Go behind the bracket that closes the one that stands here; return the text, "" where none does.

        Brackets within texts between `quotes` do not count.
        """
        start, at, depth, quote = self.at, self.at, 0, ""
        while True:
            while found := _COUNTS.search(self.source.text, at):
                character, at = found[0], found.end()
                if quote:
                    at += character == "\\"
                    quote = "" if character == quote else quote
                    continue
                depth += (character in _OPENING) - (character in _CLOSING)
                quote = character if character in quotes else ""
                if depth <= 0:
                    self._read(at)
                    self.at = at if depth == 0 and at > start + 1 else start
                    return self.source.unmarked(self.source.text[start : self.at])
            at = max(at, len(self.source.text))
            if self.source.ended:
                self._read(at)
                self.at = start
                return ""
            yield WAIT

    def _read(self, until: int) -> None:
        self.at = until
        self.looked = max(self.looked, until)


@lru_cache(maxsize=1024)
def _any_of(delimiters: tuple[str, ...]) -> re.Pattern[str]:
    """Return what finds the first of `delimiters`, the longest there: one pass, however many there are."""
    longest_first = sorted(filter(None, delimiters), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@lru_cache(maxsize=1024)
def _alone(delimiters: tuple[str, ...]) -> bool:
    """Whether none of `delimiters` begins another: the first that is found is the longest."""
    return not any(a != b and b.startswith(a) for a in delimiters for b in delimiters)
