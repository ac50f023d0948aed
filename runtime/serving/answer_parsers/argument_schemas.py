"""What a tool's schema says of an argument that is written as plain text: its types, and its choices.

References and combinations are followed, as programs that make schemas write them for enumerations and for
what may be null. Does not know how calls are spelled. Start at `ArgumentSchemas`.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from runtime.serving.answer_parsers.forms import Schema, json_value, python_word

MOST_OPTIONS = 50_000
"""Schemas that the arguments of functions may be made of, one that several refer to counted for each."""
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


class ArgumentSchemas:
    """The schemas of a function's arguments, which may all refer to the same large one."""

    def __init__(self, root: Schema, *, most: int = MOST_OPTIONS) -> None:
        """`root` is the schema of all arguments, at which references begin; it must not change.

        `most` are the schemas that they may be made of: further arguments may have any type.
        """
        self.left = most
        self._root = root
        self._listed: dict[int, tuple[frozenset[str], tuple[str, ...]]] = {}  # by the identity of a list

    def kinds(self, schema: Any) -> set[str]:
        """Return the types of JSON Schema's that an argument may have, none where its schema says nothing."""
        found: set[str] = set()
        for option in self._options(schema):
            named = option.get("type")
            if isinstance(named, str | list):
                found |= {
                    kind for kind in ([named] if isinstance(named, str) else named) if isinstance(kind, str)
                }
            else:
                found |= self._values(option)[0]
        return found

    def choices(self, schema: Any) -> list[tuple[str, ...]]:
        """Return lists of texts, of which an argument is one; none where it may be others.

        Null is no text. A list that several arguments have is the same object in each.
        """
        lists = []
        for option in self._options(schema):
            kinds, texts = self._values(option)
            if not kinds and option.get("type") != "null":
                return []
            lists.append(texts)
        return [texts for texts in lists if texts]

    def typed(self, text: str, schema: Any) -> Any:
        """Return the value of an argument that is written as plain text."""
        expected = self.kinds(schema)
        if expected == {"string"}:
            return text
        try:
            value = json_value(text)
        except ValueError:
            return python_word(text)
        if isinstance(value, str) or (expected and not any(_is(value, kind) for kind in expected)):
            return text
        return value

    def _options(self, schema: Any) -> list[Schema]:
        """Return the schemas that a schema is made of and that say a type, none once none are `left`."""
        waiting, seen, found = deque([schema]), set(), []
        while waiting:
            if self.left <= 0:
                return []
            self.left -= 1
            option = waiting.popleft()
            if not isinstance(option, Mapping) or id(option) in seen:
                continue
            seen.add(id(option))
            if not _SAYS_TYPES.isdisjoint(option):
                found.append(option)
            if isinstance(reference := option.get("$ref"), str):
                waiting.append(_referred(reference, self._root))
            for word in ("anyOf", "oneOf", "allOf"):
                waiting += parts[: self.left] if isinstance(parts := option.get(word), list) else ()
        return found

    def _values(self, option: Schema) -> tuple[frozenset[str], tuple[str, ...]]:
        """Return the types of the values that a schema lists, and those that are texts."""
        if "const" in option:
            return _facts([option["const"]])
        listed = option.get("enum")
        if not isinstance(listed, list):
            return frozenset(), ()
        if id(listed) not in self._listed:
            self._listed[id(listed)] = _facts(listed)
        return self._listed[id(listed)]


def _referred(reference: str, root: Schema) -> Any:
    """Return what a reference within `root` leads to, None for nothing."""
    if not reference.startswith("#/"):
        return None
    found: Any = root
    for key in reference[2:].split("/"):
        found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _facts(values: list[Any]) -> tuple[frozenset[str], tuple[str, ...]]:
    texts = dict.fromkeys(value for value in values if isinstance(value, str))
    return frozenset(map(_kind, values)), tuple(texts)


def _kind(value: Any) -> str:
    return next((kind for kind in _TYPES if _is(value, kind)), "null")


def _is(value: Any, kind: str) -> bool:
    """Return whether a JSON value is of a type of JSON Schema's."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, ()))
