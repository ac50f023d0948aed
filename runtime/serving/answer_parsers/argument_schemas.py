"""What a tool's schema says of an argument that is written as plain text: its types, and its choices.

References and combinations are followed, as programs that make schemas write them for enumerations and for
what may be null. Does not know how calls are spelled. Start at `kinds`, then `typed`.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from runtime.serving.answer_parsers.forms import Schema, json_value, python_word

_SAYS_TYPES = frozenset({"type", "enum", "const"})
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def kinds(schema: Any, root: Schema) -> set[str]:
    """Return the types of JSON Schema's that an argument may have, none where its schema says nothing.

    Args:
        schema: the argument's own.
        root: what its references begin at: the schema of all arguments.
    """
    found: set[str] = set()
    for option in _options(schema, root):
        named = option.get("type")
        if isinstance(named, str | list):
            found |= {
                kind for kind in ([named] if isinstance(named, str) else named) if isinstance(kind, str)
            }
        else:
            found |= {_kind(value) for value in _values(option)}
    return found


def choices(schema: Any, root: Schema) -> list[str]:
    """Return the texts that an argument is one of, none where it may be others; null is no text."""
    texts: list[str] = []
    for option in _options(schema, root):
        values = _values(option)
        if not values and option.get("type") != "null":
            return []
        texts += [value for value in values if isinstance(value, str)]
    return list(dict.fromkeys(texts))


def typed(text: str, schema: Any, root: Schema) -> Any:
    """Return the value of an argument that is written as plain text, by its schema in `root`."""
    expected = kinds(schema, root)
    if expected == {"string"}:
        return text
    try:
        value = json_value(text)
    except ValueError:
        return python_word(text)
    if isinstance(value, str) or (expected and not any(_is(value, kind) for kind in expected)):
        return text
    return value


def _options(schema: Any, root: Schema) -> Iterator[Schema]:
    """Yield the schemas that a schema is made of and that say a type, each once."""
    waiting, seen = deque([schema]), set()
    while waiting:
        option = waiting.popleft()
        if not isinstance(option, Mapping) or id(option) in seen:
            continue
        seen.add(id(option))
        if not _SAYS_TYPES.isdisjoint(option):
            yield option
        if isinstance(reference := option.get("$ref"), str):
            waiting.append(_referred(reference, root))
        for word in ("anyOf", "oneOf", "allOf"):
            waiting += parts if isinstance(parts := option.get(word), list) else ()


def _referred(reference: str, root: Schema) -> Any:
    """Return what a reference within `root` leads to, None for nothing."""
    if not reference.startswith("#/"):
        return None
    found: Any = root
    for key in reference[2:].split("/"):
        found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _values(option: Schema) -> list[Any]:
    """Return the values that a schema lists."""
    if "const" in option:
        return [option["const"]]
    return listed if isinstance(listed := option.get("enum"), list) else []


def _kind(value: Any) -> str:
    return next((kind for kind in _TYPES if _is(value, kind)), "null")


def _is(value: Any, kind: str) -> bool:
    """Return whether a JSON value is of a type of JSON Schema's."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, ()))
