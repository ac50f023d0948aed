"""What a constraint may be, and what its process may take: checked before anything grows with it.

The figures are for the people who write schemas, too: every refusal names the limit that it comes from.
Does not know llguidance or JSON Schema's words. Start at `encoded`.
"""

import json
import re
from typing import Any

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint

MAX_FORM_BYTES = 256 * 1024
"""Of a schema, pattern or grammar as JSON text; schemas of real tools are below 100 KiB."""
MAX_DEPTH = 64
"""Nesting of a schema."""
MAX_NODES = 20_000
"""Objects, lists and values of a schema."""
MAX_PATTERN_CHARACTERS = 4096
"""Of one regular expression."""
MAX_ENUM_TEXTS = 5_000
"""Of one `enum`."""
MAX_COUNT = 10_000
"""Of any repetition: `{1,n}` in a pattern, minItems, maxLength and their like."""

CODE_POINT = re.compile(r"\\(?:[xuU]\{([0-9A-Fa-f]+)\}|.)", re.DOTALL)
"""An escape; one in braces with its digits."""
REPETITION = re.compile(r"\\(?:[xuU]\{[0-9A-Fa-f]+\}|.)|\[(?:\\.|[^\]\\])*\]|\{(\d*)(?:,(\d*))?\}", re.DOTALL)
"""What comes first in it is no repetition: an escape, a class."""
LAST_CODE_POINT = 0x10FFFF

COMPILE_CPU_S = 2.0
"""Processor time that a form may take before its first token."""
COMPILE_WALL_S = 10.0
"""The same on the clock: on a machine with other work."""
MASK_CPU_S = 0.2
"""Processor time for one token; llguidance's own limits end nearly every form earlier."""
MASK_WALL_S = 2.0
"""The same on the clock."""
MEMORY_BYTES = 512 * 2**20
"""Beyond what the vocabulary takes, for a form and all answers that follow it."""

PARSER_LIMITS: dict[str, int] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}
"""llguidance's LLParserLimits: about 20 ms of work before the first token and 10 ms for each one."""


def encoded(constraint: Constraint) -> str:
    """Return the value of `constraint` as JSON text; RequestError where it is larger than any form may be."""
    _check_tree(constraint)
    text = json.dumps(constraint.value, ensure_ascii=False)
    if len(text) > MAX_FORM_BYTES:
        raise refused(constraint, f"has {len(text)} characters, at most {MAX_FORM_BYTES}")
    return text


def check_pattern(pattern: str, constraint: Constraint, path: str = "") -> None:
    """Raise RequestError for a regular expression that is too long, or beyond what it may name or repeat."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        most = MAX_PATTERN_CHARACTERS
        raise refused(constraint, f"a pattern of {len(pattern)} characters, at most {most}", path)
    for found in REPETITION.finditer(pattern):
        if any(count and (len(count) > 9 or int(count) > MAX_COUNT) for count in found.groups()):
            raise refused(constraint, f"repeats {found[0][:40]}, at most {MAX_COUNT} times", path)
    for found in CODE_POINT.finditer(pattern):
        if found[1] and int(found[1], 16) > LAST_CODE_POINT:
            raise refused(constraint, f"{found[0][:40]} is no character, the last is 10FFFF", path)


def refused(constraint: Constraint, reason: str, path: str = "") -> RequestError:
    """Return the failure of a constraint that is not carried out, at `path` inside it."""
    at = f" at {path}" if path else ""
    return RequestError(f"'{constraint.param}'{at}: {reason}", param=constraint.param)


def _check_tree(constraint: Constraint) -> None:
    """Raise RequestError for a value too deep or of too many parts; looks at no more than it allows."""
    level: list[Any] = [constraint.value]
    seen = depth = 0
    while level:
        seen += len(level)
        if seen > MAX_NODES:
            raise refused(constraint, f"has more than {MAX_NODES} values and keys")
        if depth > MAX_DEPTH:
            raise refused(constraint, f"is nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            if len(below) > MAX_NODES:
                break
        level, depth = below, depth + 1
