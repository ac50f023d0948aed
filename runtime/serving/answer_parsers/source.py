"""The text of an answer while it arrives, for parsers that are written as if it were all there.

A parser is a generator: it yields parts, and `WAIT` where it needs more text than there is. So it says once
what a format looks like, and any division of the text gives the same parts. Does not know any format. Start
at `AnswerSource`, then `Cursor`.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from runtime.serving.answer_parsers.parts import Part
from runtime.serving.detokenize import marked, overlap

T = TypeVar("T")
WAIT: Literal["wait"] = "wait"
Steps = Generator[Part | Literal["wait"], None, T]
"""What a parser yields, and what it returns."""

_OPENING, _CLOSING = frozenset("[{("), frozenset("]})")
_PLAIN = re.compile(r"[^\[\](){}\"']+")


class AnswerSource:
    """Text that has arrived and is not yet part of the answer."""

    def __init__(self, marks: Mapping[str, str] | None = None) -> None:
        """`marks` are special tokens with the characters that stand for them in the text."""
        self._marks = marks or {}
        self._unmarked = str.maketrans(dict.fromkeys(self._marks.values(), ""))
        self.rest = ""
        """What is not taken."""
        self.held = 0
        """Characters of that, marks left out."""
        self.ended = False
        self.taken = 0
        """Characters taken so far."""
        self.thoughts: list[tuple[int, int]] = []
        """(start, end) of what was taken as reasoning."""

    def add(self, text: str) -> None:
        """Append what has arrived."""
        self.rest += text
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

    def take(self, count: int, *, thought: bool = False) -> str:
        """Return the next `count` characters, and go behind them."""
        text, self.rest = self.rest[:count], self.rest[count:]
        if thought and text:
            start = self.taken
            if self.thoughts and self.thoughts[-1][1] == start:
                start = self.thoughts.pop()[0]
            self.thoughts.append((start, self.taken + count))
        self.taken += len(text)
        self.held -= len(self.unmarked(text))
        return text

    def find(self, delimiters: Sequence[str], start: int = 0) -> tuple[int, str]:
        """Return where the first delimiter stands, the longest there, and which; (-1, "") for none."""
        places = [(at, -len(each), each) for each in delimiters if (at := self.rest.find(each, start)) >= 0]
        at, _, found = min(places, default=(-1, 0, ""))
        return at, found

    def undecided(self, delimiters: Sequence[str]) -> int:
        """Return how many of the last characters may begin a delimiter."""
        return 0 if self.ended else max((overlap(self.rest, each) for each in delimiters), default=0)

    def starts(self, options: Sequence[str]) -> Steps[str]:
        """Return which of `options` the text begins with, the longest, "" for none."""
        return (yield from Cursor(self, 0).literal(options))


@dataclass(slots=True)
class Cursor:
    """A place ahead in the text, for what is taken only where it is a call as a whole."""

    source: AnswerSource
    at: int

    def literal(self, options: Sequence[str]) -> Steps[str]:
        """Go behind the longest of `options` that stands here, and return it; "" for none."""
        while True:
            rest = self.source.rest[self.at : self.at + max(map(len, options), default=0)]
            longer = not self.source.ended and any(
                len(each) > len(rest) and each.startswith(rest) for each in options
            )
            if not longer:
                found = max((each for each in options if rest.startswith(each)), key=len, default="")
                self.at += len(found)
                return found
            yield WAIT

    def space(self) -> Steps[None]:
        """Go behind white space."""
        while True:
            rest = self.source.rest
            while self.at < len(rest) and rest[self.at].isspace():
                self.at += 1
            if self.at < len(rest) or self.source.ended:
                return
            yield WAIT

    def peek(self) -> Steps[str]:
        """Return the next character, "" at the end."""
        while self.at >= len(self.source.rest) and not self.source.ended:
            yield WAIT
        return self.source.rest[self.at : self.at + 1]

    def until(self, delimiters: Sequence[str], *, or_end: bool = False) -> Steps[tuple[str | None, str]]:
        """Go behind the first delimiter; return the text before it, and which it is.

        At the end without one, the text is None, or with `or_end` all that is left.
        """
        searched, longest = self.at, max(map(len, delimiters))
        while True:
            place, found = self.source.find(delimiters, searched)
            if found and (
                place + longest <= len(self.source.rest) or self.source.ended or _alone(delimiters)
            ):
                text = self.source.unmarked(self.source.rest[self.at : place])
                self.at = place + len(found)
                return text, found
            if self.source.ended:
                text = self.source.unmarked(self.source.rest[self.at :])
                if or_end:
                    self.at = len(self.source.rest)
                return (text if or_end else None), ""
            if not found:
                searched = max(self.at, len(self.source.rest) - longest + 1)
            yield WAIT

    def bracketed(self, quotes: str = '"') -> Steps[str]:
        """Go behind the bracket that closes the one that stands here; return the text, "" where none does.

        Brackets within texts between `quotes` do not count.
        """
        start, at, depth, quote = self.at, self.at, 0, ""
        while True:
            rest = self.source.rest
            while at < len(rest):
                character = rest[at]
                if quote:
                    at += 1 + (character == "\\")
                    quote = "" if character == quote else quote
                    continue
                if plain := _PLAIN.match(rest, at):
                    at = plain.end()
                    continue
                at += 1
                depth += (character in _OPENING) - (character in _CLOSING)
                quote = character if character in quotes else ""
                if depth <= 0:
                    self.at = at if depth == 0 and at > start + 1 else start
                    return self.source.unmarked(rest[start : self.at])
            if self.source.ended:
                return ""
            yield WAIT


def _alone(delimiters: Sequence[str]) -> bool:
    """Whether none of `delimiters` begins another: the first that is found is the longest."""
    return not any(a != b and b.startswith(a) for a in delimiters for b in delimiters)
