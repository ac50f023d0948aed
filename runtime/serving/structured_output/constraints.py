"""The constraints that requests ask for without writing a schema themselves.

Knows JSON Schema; does not know llguidance or routes. Start at `json_object`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from runtime.serving.engine.protocol import Constraint


def json_object(param: str) -> Constraint:
    """Return the constraint that the answer is a JSON object."""
    return Constraint("schema", {"type": "object"}, param)


def one_of(texts: Sequence[str], param: str) -> Constraint:
    """Return the constraint that the answer is one of `texts`."""
    return Constraint("regex", "|".join(f"(?:{re.escape(text)})" for text in texts), param)


def function_call(functions: Iterable[tuple[str, dict[str, Any] | None]], param: str) -> Constraint:
    """Return the constraint that the answer calls one of `functions`: (name, schema of its arguments)."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in functions
    ]
    return Constraint("schema", calls[0] if len(calls) == 1 else {"anyOf": calls}, param)
