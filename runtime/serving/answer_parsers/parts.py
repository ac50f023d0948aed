"""The parts of an answer, as they arrive and put together: what every route writes in its own JSON.

A call has its start (id, name, index), its arguments in one or more pieces, and its end, in this order. Start
at `Part`, then `ParsedAnswer`.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text that the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a call; `index` counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the arguments of call `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """Call `index` is complete: its arguments are the text of a JSON object."""

    index: int


Part = ReasoningDelta | ContentDelta | CallStart | CallArguments | CallEnd


@dataclass(slots=True)
class ParsedCall:
    """One call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    """The parts of an answer put together."""

    parts: list[Part] = field(default_factory=list)
    """All of it in the order in which the model wrote it."""
    calls: list[ParsedCall] = field(default_factory=list)

    @property
    def reasoning(self) -> str:
        """All that was thought."""
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningDelta))

    @property
    def content(self) -> str:
        """The answer itself."""
        return "".join(part.text for part in self.parts if isinstance(part, ContentDelta))

    def add(self, parts: Iterable[Part]) -> None:
        """Append parts in the order of their arrival."""
        for part in parts:
            self.parts.append(part)
            match part:
                case CallStart(_, call_id, name):
                    self.calls.append(ParsedCall(call_id, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text


def joined(parts: Iterable[Part]) -> list[Part]:
    """Return parts with those texts joined that follow each other and are of one kind."""
    found: list[Part] = []
    for kind, run in groupby(parts, type):
        if issubclass(kind, ContentDelta | ReasoningDelta):
            found.append(kind("".join(part.text for part in run if isinstance(part, kind))))
        else:
            found += run
    return found


def new_call_id() -> str:
    """Return an id for a call as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"
