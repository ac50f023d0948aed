"""Calls written as Python: `[weather(city="Oslo"), time()]` (Llama 3.2 and 4, LFM2, OLMo 3).

Arguments are literals with their names; nothing is ever run. Start at `reader`.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence

from runtime.serving.answer_parsers.forms import FoundCall, Read, Tools
from runtime.serving.answer_parsers.source import Cursor, Steps

MOST_CHARACTERS = 2**17
"""Of one list of calls; Python's parser takes time and memory for each."""
_NAMED = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?<![\w.\-/:$@])([\w.\-/:$@]*\w)(?=\s*[(=])""", re.DOTALL
)
"""A text between quotes, or the name of a function or an argument, which need not be one in Python."""
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
        names: dict[str, str] = {}

        def stand_in(found: re.Match[str]) -> str:
            return found[1] or names.setdefault(found[2], f"_{len(names)}")

        listed = ast.parse(_NAMED.sub(stand_in, text.strip()), mode="eval").body
        if not isinstance(listed, ast.List) or not listed.elts:
            return None
        meant = {name: written for written, name in names.items()}
        return [_call(each, meant) for each in listed.elts]
    except (SyntaxError, ValueError, KeyError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr, meant: Mapping[str, str]) -> FoundCall:
    """Return the call that an expression is, its names as `meant` has them; ValueError for another."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("no call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments without names")
        arguments[meant[keyword.arg]] = _literal(keyword.value)
    return FoundCall(meant[node.func.id], json.dumps(arguments, ensure_ascii=False, allow_nan=False))


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
