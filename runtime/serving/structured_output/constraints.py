"""The constraints that requests ask for without writing a schema themselves.

Knows JSON Schema; does not know llguidance or routes. Start at `json_object`.
"""

import re
from collections.abc import Sequence
from typing import Any

from runtime.serving.engine.protocol import Constraint


def json_object(param: str) -> Constraint:
    """Return the constraint that the answer is a JSON object."""
    return Constraint("schema", {"type": "object"}, param)


def one_of(texts: Sequence[str], param: str) -> Constraint:
    """Return the constraint that the answer is one of `texts`."""
    return Constraint("regex", "|".join(f"(?:{re.escape(text)})" for text in texts), param)


def function_call(
    functions: Sequence[tuple[str, dict[str, Any] | None]], param: str, *, strict: bool = False
) -> Constraint:
    """Return the constraint that the answer calls one of `functions`: (name, schema of its arguments)."""
    one = len(functions) == 1
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": _moved(parameters, f"#{'' if one else f'/anyOf/{i}'}/properties/arguments")
                if parameters
                else {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (name, parameters) in enumerate(functions)
    ]
    return Constraint("schema", calls[0] if one else {"anyOf": calls}, param, strict)


def _moved(schema: Any, root: str) -> Any:
    """Return a schema whose references to its own root point to `root`, where it now is."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {word: _moved(part, root) for word, part in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved
