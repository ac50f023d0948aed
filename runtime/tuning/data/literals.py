"""Values that were written into a text: JSON, or what Python prints for lists and dicts.

CSV files hold lists of messages and tools in these forms. Does not know what the values mean. Start at
`parse`.
"""

import ast
import json
import re
from typing import Any

from runtime.tuning.data.limits import DEEPEST_NESTING

LONGEST_LITERAL = 4 << 20
"""Characters that Python's parser is given: it takes some hundred bytes for each."""

_AS_NUMPY_PRINTS = re.compile(
    r"""((?:'(?:[^'\\]|\\.)*+'?|"(?:[^"\\]|\\.)*+"?)|[}\])])(\s+(?=['"\[{]|array\(|list\())?"""
    r"""|\bnan\b|\b(?:array|list)(?=\()|,\s*dtype=object(?=\))""",
    re.DOTALL,
)
"""A text, or the end of a list or object, with what separates it from the next; NaN; the marks of an array.

Texts are taken whole, with or without their end, so that what is in them is left alone and time is linear.
"""


def parse(text: str) -> Any:
    """Return the value that `text` is JSON or a Python literal of.

    ValueError when it is neither, or nested deeper than rows may be.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_literal(text.strip())
    if not _is_flat(value, DEEPEST_NESTING):
        raise ValueError(f"nested deeper than {DEEPEST_NESTING} levels")
    return value


def _python_literal(text: str) -> Any:
    if len(text) > LONGEST_LITERAL:
        raise ValueError("not JSON, and too long for a Python literal")
    try:
        return ast.literal_eval(_AS_NUMPY_PRINTS.sub(_as_python, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


def _as_python(found: re.Match[str]) -> str:
    """Return a piece as Python has it: with the comma without which two texts would be joined."""
    if found[0] == "nan":
        return "None"
    return (found[1] or "") + (", " if found[2] else "")


def _is_flat(value: Any, levels: int) -> bool:
    """Return whether `value` has at most `levels` of lists and objects inside one another."""
    if not isinstance(value, dict | list | tuple):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_flat(item, levels - 1) for item in items)


def parse_container(value: Any) -> Any:
    """Return the list or dict that `value` is the text of; `value` itself when it is no such text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return parse(value)
    except ValueError:
        return value


def parse_quoted(value: Any) -> Any:
    """Return the text that `value` is a JSON string of; `value` itself when it is none."""
    if not isinstance(value, str) or value.lstrip()[:1] != '"':
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, str) else value
