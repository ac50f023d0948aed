"""Calls that are JSON: one object with a name and arguments, several of them, or a list.

Hermes and Qwen 2.5 and 3 (`<tool_call>`), Llama 3 (bare, or behind `<|python_tag|>`), Granite, Phi-4-mini,
Jamba, InternLM. Start at `reader`.
"""

from collections.abc import Sequence

from runtime.serving.answer_parsers.forms import FoundCall, Read, Tools, entry_call, json_value
from runtime.serving.answer_parsers.source import Cursor, Steps


def reader(closings: Sequence[str] = (), *, separators: Sequence[str] = ()) -> Read:
    """Return what reads JSON calls up to one of `closings`, or the end of the answer.

    Several values follow each other, with one of `separators` between them or none.
    """

    def read(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
        found: list[FoundCall] = []
        between = cursor.source.mark(separators)
        ends = cursor.source.mark(closings)
        while True:
            calls = yield from values(cursor)
            if calls is None:
                return found or None
            found += calls
            end = cursor.at
            yield from cursor.space()
            if ends and (yield from cursor.literal(ends)):
                return found
            if between:
                yield from cursor.literal(between)
                yield from cursor.space()
            if (yield from cursor.peek()) not in ("{", "["):
                cursor.at = end
                return found

    return read


def values(cursor: Cursor) -> Steps[list[FoundCall] | None]:
    """Read one JSON value: the calls that it is, None where it is something else."""
    start = cursor.at
    yield from cursor.space()
    if (yield from cursor.peek()) not in ("{", "["):
        cursor.at = start
        return None
    text = yield from cursor.bracketed()
    try:
        value = json_value(text)
    except ValueError:
        cursor.at = start
        return None
    calls = [entry_call(entry) for entry in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    if not found or len(found) < len(calls):
        cursor.at = start
        return None
    return found
