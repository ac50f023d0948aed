"""Calls written as Python: `[weather(city="Oslo"), time()]` (Llama 3.2 and 4, LFM2, OLMo 3).

Arguments are literals with their names; nothing is ever run. Start at `reader`.
"""

import ast
import json
from collections.abc import Sequence

from runtime.serving.answer_parsers.forms import FoundCall, Read, Tools
from runtime.serving.answer_parsers.source import Cursor, Steps

MOST_CHARACTERS = 2**17
"""Of one list of calls; Python's parser takes time and memory for each."""
_WORDS = {"true": True, "false": False, "null": None}


def reader(closings: Sequence[str] = ()) -> Read:
    """Return what reads a list of calls, and one of `closings` behind it where it stands there."""

    def read(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
        yield from cursor.space()
        if (yield from cursor.peek()) != "[":
            return None
        text = yield from cursor.bracketed("\"'")
        found = calls_in(text)
        if found and closings:
            end = cursor.at
            yield from cursor.space()
            if not (yield from cursor.literal(cursor.source.mark(closings))):
                cursor.at = end
        return found

    return read


def calls_in(text: str) -> list[FoundCall] | None:
    """Return the calls in a list of calls; None where it is anything else."""
    if len(text) > MOST_CHARACTERS:
        return None
    try:
        listed = ast.parse(text.strip(), mode="eval").body
        if not isinstance(listed, ast.List) or not listed.elts:
            return None
        return [_call(each) for each in listed.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> FoundCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments without names")
        arguments[keyword.arg] = _literal(keyword.value)
    return FoundCall(_name(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    raise ValueError("no name")


def _literal(node: ast.expr) -> object:
    match node:
        case ast.Name(name) if name in _WORDS:
            return _WORDS[name]
        case ast.Constant(value) if value is None or isinstance(value, str | int | float | bool):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) in (int, float):
            return -value  # type: ignore[operator]
        case ast.List(parts) | ast.Tuple(parts):
            return [_literal(part) for part in parts]
        case ast.Dict(keys, values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no text as a key")
