"""Gemma 4's calls: `<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>`.

Names of arguments stand without quotes, texts between `<|"|>`. Start at `read`.
"""

import json
from typing import Any

from runtime.serving.answer_parsers.forms import FoundCall, Tools, is_name, json_value, python_word
from runtime.serving.answer_parsers.source import Cursor, Steps

OPENING, CLOSING, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
DEEPEST = 32


def read(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
    """Read one call from behind its opening."""
    if not (yield from cursor.literal(("call:",))):
        return None
    name, _ = yield from cursor.until(("{",))
    if name is None or not is_name(name.strip(), tools):
        return None
    arguments = yield from _object(cursor, 0)
    if arguments is None:
        return None
    yield from cursor.space()
    yield from cursor.literal(cursor.source.mark((CLOSING,)))
    try:
        return [FoundCall(name.strip(), json.dumps(arguments, ensure_ascii=False, allow_nan=False))]
    except ValueError:
        return None


def _object(cursor: Cursor, depth: int) -> Steps[dict[str, Any] | None]:
    """Read an object from behind its brace; None where it is none."""
    found: dict[str, Any] = {}
    while True:
        yield from cursor.space()
        if (yield from cursor.literal(("}",))):
            return found
        key, _ = yield from cursor.until((":",))
        value = (yield from _value(cursor, depth + 1)) if key is not None else None
        if key is None or value is None:
            return None
        found[key.replace(QUOTE, "").strip().strip('"')] = value[0]
        yield from cursor.space()
        yield from cursor.literal((",",))


def _list(cursor: Cursor, depth: int) -> Steps[list[Any] | None]:
    """Read a list from behind its bracket; None where it is none."""
    found: list[Any] = []
    while True:
        yield from cursor.space()
        if (yield from cursor.literal(("]",))):
            return found
        value = yield from _value(cursor, depth + 1)
        if value is None:
            return None
        found.append(value[0])
        yield from cursor.space()
        yield from cursor.literal((",",))


def _value(cursor: Cursor, depth: int) -> Steps[tuple[Any] | None]:
    """Read a value; None where there is none, or it is nested too deeply."""
    yield from cursor.space()
    quote = cursor.source.mark((QUOTE, '"'))
    opening = yield from cursor.literal((*quote, "{", "["))
    if opening in quote and opening:
        text, end = yield from cursor.until((opening,))
        return (text,) if text is not None and end else None
    if opening:
        inner = (_object if opening == "{" else _list) if depth < DEEPEST else None
        value = (yield from inner(cursor, depth)) if inner is not None else None
        return (value,) if value is not None else None
    text, end = yield from cursor.until((",", "}", "]"))
    if text is None or not text.strip():
        return None
    cursor.at -= len(end)
    try:
        return (json_value(text.strip()),)
    except ValueError:
        return (python_word(text.strip()),)
