"""Values that were written into a text: JSON, or what Python prints for lists and dicts.

CSV files hold lists of messages and tools in these forms. Does not know what the values mean. Start at
`parse`.
"""

import ast
import json
import re
from typing import Any

_MISSING_COMMA = re.compile(r"\}\s*\n\s*\{")
"""Between the dicts of a NumPy array as it is printed; a line break inside a text is printed as an escape."""


def parse(text: str) -> Any:
    """Return the value that `text` is JSON or a Python literal of; ValueError when it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        try:
            return ast.literal_eval(text.strip())
        except SyntaxError:
            return ast.literal_eval(_MISSING_COMMA.sub("}, {", text.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


def parse_container(value: Any) -> Any:
    """Return the list or dict that `value` is the text of; `value` itself when it is no such text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return parse(value)
    except ValueError:
        return value
