"""What a format is: how a family of models spells its thoughts and its calls.

A format of calls is where a call may begin and a function that reads it. Does not know which model has which
format (formats.py), or how a text is read with it (parser.py). Start at `AnswerForm`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.serving.answer_parsers.parts import CallArguments, CallEnd, CallStart, Part, new_call_id
from runtime.serving.answer_parsers.source import Cursor, Steps

Schema = Mapping[str, Any]
Tools = Mapping[str, Schema]
"""The functions of a request: their names, and the JSON schemas of their arguments."""


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """Thoughts before the answer, between two of these delimiters."""

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    implied: bool = False
    """An answer begins within a thought where neither the prompt nor the answer says so."""
    answer: tuple[str, str] | None = None
    """What may stand around the answer that follows a thought."""


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A call that was read; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Read = Callable[[Cursor, Tools], Steps[list[FoundCall] | None]]
"""Reads calls from behind their opening, and leaves the cursor behind them; None where there are none."""


@dataclass(frozen=True, slots=True)
class CallSpelling:
    """How calls are written where an answer must consist of them."""

    call: str
    """One call, with `{name}` and `{arguments}`: JSON, unless `argument` says how one is written."""
    before: str = ""
    between: str = ""
    after: str = ""
    argument: str = ""
    """One argument, with `{key}` and `{value}`."""
    separator: str = ""
    """Between two arguments."""
    plain_text: bool = False
    """Arguments that are texts are not JSON's."""
    quote: str = ""
    """What stands around those."""
    token: str = ""
    """A special token of models that write calls like this; others write them as `without` says."""
    without: "CallSpelling | None" = None


@dataclass(frozen=True, slots=True)
class CallFormat:
    """Calls in the text of an answer."""

    read: Read
    spelling: CallSpelling
    openings: tuple[str, ...] = ()
    """What stands before calls, wherever these are."""
    inside: tuple[str, ...] = ()
    """Delimiters within and behind calls."""
    bare: str = ""
    """Characters with which calls may begin an answer without an opening, where they name declared tools."""
    inline: tuple[str, ...] = ()
    """How calls without an opening begin anywhere, where they name declared tools."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How one answer is read. Without anything of this, it is content as a whole."""

    thoughts: ThoughtFormat | None = None
    calls: CallFormat | None = None
    harmony: bool = False
    """The answer is in channels, which say both."""
    tools: Tools = field(default_factory=dict)
    """Calls are looked for where there are tools."""
    only_tools: bool = False
    """A call of any other function stays text, whatever its delimiters."""
    one_call: bool = False
    """Calls after the first are left out."""

    @property
    def plain(self) -> bool:
        """Whether all of the text is content."""
        return not (self.thoughts or self.harmony or (self.calls and self.tools))


def parts_of(call: FoundCall, index: int) -> tuple[Part, ...]:
    """Return a complete call as parts."""
    start = CallStart(index, new_call_id(), _well_formed(call.name))
    return start, CallArguments(index, _well_formed(call.arguments)), CallEnd(index)


def _well_formed(text: str) -> str:
    """Return a text with the halves of characters, which escapes can spell, joined, or U+FFFD for them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_value(text: str) -> Any:
    """Return the value of JSON text; ValueError for what is none, or cannot be written again."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def arguments_text(value: Any) -> str | None:
    """Return the arguments of a call as JSON text, None where they are no object; a text may hold one."""
    if isinstance(value, str):
        try:
            value = json_value(value) if value.strip() else {}
        except ValueError:
            return None
    if value is None:
        value = {}
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def entry_call(entry: Any) -> FoundCall | None:
    """Return the call that a JSON object is: its name, with `arguments` or `parameters`."""
    if not isinstance(entry, dict):
        return None
    function = entry.get("function")
    if isinstance(function, dict):
        entry = function
    name = entry.get("name", function)
    if not isinstance(name, str) or not name:
        return None
    given: Any = next((entry[key] for key in ("arguments", "parameters") if key in entry), {})
    arguments = arguments_text(given)
    return FoundCall(name, arguments) if arguments is not None else None


def python_word(text: str) -> Any:
    """Return what Python's words for true, false and null mean, and any other text as it is."""
    words = {"True": True, "False": False, "None": None}
    return words.get(text, text)


_NAME = re.compile(r"[A-Za-z_][\w.\-]*")


def is_name(text: str, tools: Tools) -> bool:
    """Whether a text is a function's, where nothing but the spelling says so: a declared one has any."""
    return text in tools or _NAME.fullmatch(text) is not None
