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

_MISSING_COMMA = re.compile(r"\}\s*\n\s*\{")
"""Between the dicts of a NumPy array as it is printed; a line break inside a text is printed as an escape."""


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
        try:
            return ast.literal_eval(text)
        except SyntaxError:
            return ast.literal_eval(_MISSING_COMMA.sub("}, {", text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


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
