"""What is wrong in a schema that llguidance refuses, in JSON Schema's words and with its path.

Asked only then: what is never reached may be malformed. Does not know llguidance. Start at `malformed`, then
`culprit`.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from runtime.serving.structured_output.negation import TYPES, Schema

Steps = list[Any]
"""Names and indices."""
ALL_TYPES = (*TYPES, "integer")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
NESTED = frozenset({"items", "additionalItems", "additionalProperties", "contains", "propertyNames"}) | {
    "not",
    "if",
    "then",
    "else",
    "unevaluatedItems",
    "unevaluatedProperties",
}
"""Words with schemas in them: a list of them, a mapping of names to them, and one."""
LOOKING_S = 0.5
"""Processor time that the search for a path may take."""
SHOWN = 60
"""Characters of a wrong value."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value % 1 == 0


def _are_types(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(name in ALL_TYPES for name in names)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_full_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


COUNTED = ("Length", "Items", "Properties", "Contains")
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_are_types, f"one of {', '.join(sorted(ALL_TYPES))}, or a list of them"),
    "required": (_are_names, "a list of names"),
    "enum": (_is_full_list, "a list of at least one value"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")),
    **{f"{end}{of}": (_is_count, "a count of 0 or more") for end in ("min", "max") for of in COUNTED},
    **dict.fromkeys(("pattern", "format", "$ref"), (_is_text, "a text")),
    **dict.fromkeys(LISTED, (_is_full_list, "a list of at least one schema")),
    **dict.fromkeys(NAMED, (_is_mapping, "an object of names and their schemas")),
}
"""What the value of a word is to be: the check, and its words."""


def malformed(schema: Schema, path: str = "#") -> tuple[str, str] | None:
    """Return the path and what is wrong of the first word whose value is none that it may have."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return path, f"{_shown(schema)} is no schema: an object, true or false"
    for word, value in schema.items():
        if word in EXPECTED and not EXPECTED[word][0](value):
            return f"{path}/{word}", f"{_shown(value)} is not {EXPECTED[word][1]}"
    for at, part in _parts(schema):
        if found := malformed(part, "/".join([path, *map(str, at)])):
            return found
    return None


def culprit(schema: Schema, takes: Callable[[Schema], bool]) -> str:
    """Return the path of the deepest part without which `schema` is taken; "" where no single one is."""
    until = time.process_time() + LOOKING_S

    def is_taken_without(steps: Steps) -> bool:
        return time.process_time() < until and takes(_with(schema, steps, True))

    path: Steps = []
    part = schema
    while isinstance(part, dict):
        found = [at for at, _ in _parts(part) if is_taken_without(path + at)]
        if len(found) != 1 or time.process_time() > until:
            break
        path += found[0]
        for step in found[0]:
            part = part[step]
    return "/".join(["#", *map(str, path)]) if path else ""


def _with(value: Any, steps: Steps, new: Any) -> Any:
    """Return a copy of `value` with `new` where `steps` lead."""
    if not steps:
        return new
    copy = value.copy()
    copy[steps[0]] = _with(value[steps[0]], steps[1:], new)
    return copy


def _parts(schema: dict[str, Any]) -> Iterator[tuple[Steps, Schema]]:
    """Return the schemas in a schema, and the steps to them."""
    for word, value in schema.items():
        if word in NAMED and isinstance(value, dict):
            yield from (([word, name], part) for name, part in value.items())
        elif word in (*LISTED, "items") and isinstance(value, list):
            yield from (([word, i], part) for i, part in enumerate(value))
        elif word in NESTED:
            yield [word], value


def _shown(value: Any) -> str:
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
