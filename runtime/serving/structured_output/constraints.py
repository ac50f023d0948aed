"""The constraints that requests ask for without writing a schema themselves.

Knows JSON Schema; does not know llguidance or routes. Start at `json_object`.
"""

import re
from collections.abc import Sequence

from runtime.serving.engine.protocol import Constraint


def json_object(param: str) -> Constraint:
    """Return the constraint that the answer is a JSON object."""
    return Constraint("schema", {"type": "object"}, param)


def one_of(texts: Sequence[str], param: str) -> Constraint:
    """Return the constraint that the answer is one of `texts`."""
    return Constraint("regex", "|".join(f"(?:{re.escape(text)})" for text in texts), param)
