"""What is not, in JSON Schema's own words: the part of `not`, `if` and `oneOf` that a grammar can follow.

A negation is given beside the schema that holds in any case, as most of them are only finite there: "not 'a'"
is one of the others where the values are listed. Start at `negated`.
"""

from typing import Any

Schema = Any
"""A mapping, True or False."""

TYPES = ("null", "boolean", "number", "string", "array", "object")
NOTES = frozenset(
    {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
)


class UnknownNegation(Exception):
    """There is no schema for it."""


class Definitions:
    """The schema that references are resolved in."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def resolved(self, schema: Schema) -> Schema:
        """Return what `schema` refers to where that is all it does; itself where it does not."""
        for _ in range(16):
            if not isinstance(schema, dict) or not isinstance(reference := schema.get("$ref"), str):
                return schema
            if not reference.startswith("#") or schema.keys() - NOTES - {"$ref"}:
                return schema
            found: Any = self._root
            for step in reference.removeprefix("#").split("/")[1:]:
                part = step.replace("~1", "/").replace("~0", "~")
                if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                    found = found[int(part)]
                elif isinstance(found, dict) and part in found:
                    found = found[part]
                else:
                    return schema
            schema = found
        return schema

    def types(self, schema: Schema) -> frozenset[str]:
        """Return the types that `schema` may allow; an integer is a number."""
        schema = self.resolved(schema)
        if schema is False:
            return frozenset()
        if not isinstance(schema, dict):
            return frozenset(TYPES)
        if (values := self.values(schema)) is not None:
            return frozenset(map(type_of, values))
        if "type" in schema:
            names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            return frozenset("number" if name == "integer" else str(name) for name in names)
        for word in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(word), list):
                return frozenset().union(*map(self.types, options))
        return frozenset(TYPES)

    def values(self, schema: Schema) -> list[Any] | None:
        """Return the values that `schema` lists, None where it lists none."""
        schema = self.resolved(schema)
        if not isinstance(schema, dict):
            return None
        if "const" in schema:
            return [schema["const"]]
        if isinstance(values := schema.get("enum"), list):
            return values
        return [False, True] if schema.get("type") == "boolean" else None

    def disjoint(self, one: Schema, other: Schema, depth: int = 0) -> bool:
        """Return whether no value can match both; False where that is not known."""
        one, other = self.resolved(one), self.resolved(other)
        if not self.types(one) & self.types(other):
            return True
        ones, others = self.values(one), self.values(other)
        if ones is not None and others is not None:
            return not {key_of(value) for value in ones} & {key_of(value) for value in others}
        if depth > 4 or not (isinstance(one, dict) and isinstance(other, dict)):
            return False
        if not self.types(one) & self.types(other) <= {"object"}:
            return False
        properties = [each.get("properties") or {} for each in (one, other)]
        required = [set(each.get("required") or ()) for each in (one, other)]
        for name in required[0] | required[1]:
            left, right = (
                known.get(name, schema.get("additionalProperties", True))
                for known, schema in zip(properties, (one, other), strict=True)
            )
            if False in (left, right) or self.disjoint(left, right, depth + 1):
                return True
        return False

    def negated(self, schema: Schema, beside: Schema) -> Schema:
        """Return a schema of what matches `beside` and not `schema`; raises UnknownNegation."""
        schema, beside = self.resolved(schema), self.resolved(beside)
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            raise UnknownNegation
        words = schema.keys() - NOTES
        options: list[Schema] = []
        if "type" in words and not words & {"const", "enum"}:
            words -= {"type"}
            options += self._other_types(schema, beside)
        if words & {"const", "enum"}:
            words -= {"const", "enum", "type"}
            options += self._other_values(schema, beside)
        if "required" in words or "properties" in words:
            words -= {"required", "properties"}
            options += self._other_properties(schema, beside)
        if "anyOf" in words and words == {"anyOf"}:
            parts = [self.negated(part, beside) for part in schema["anyOf"]]
            return {"allOf": parts}
        if "allOf" in words:
            words -= {"allOf"}
            options += [self.negated(part, beside) for part in schema["allOf"]]
        if words == {"not"}:
            return schema["not"]
        if words:
            raise UnknownNegation
        options = [option for option in options if option is not False]
        return False if not options else options[0] if len(options) == 1 else {"anyOf": options}

    def _other_types(self, schema: dict[str, Any], beside: Schema) -> list[Schema]:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        left = self.types(beside) - self.types({"type": named})
        whole = "integer" in named and "number" not in named and "number" in self.types(beside)
        if whole and not (isinstance(beside, dict) and beside.get("type") == "integer"):
            raise UnknownNegation  # numbers that are not whole
        return [{"type": sorted(left)}] if left else []

    def _other_values(self, schema: dict[str, Any], beside: Schema) -> list[Schema]:
        values = {key_of(value) for value in self.values(schema) or ()}
        if (listed := self.values(beside)) is not None:
            left = [value for value in listed if key_of(value) not in values]
            return [{"enum": left}] if left else []
        if not self.types(schema) & self.types(beside):
            return [True]
        raise UnknownNegation

    def _other_properties(self, schema: dict[str, Any], beside: Schema) -> list[Schema]:
        """Return the objects that lack a required property, or have one that does not match."""
        own = beside if isinstance(beside, dict) else {}
        known, needed = own.get("properties") or {}, set(own.get("required") or ())
        missing = [name for name in schema.get("required") or () if name not in needed]
        options: list[Schema] = [{"type": "object", "properties": {name: False}} for name in missing]
        for name, part in (schema.get("properties") or {}).items():
            other = self.negated(part, known.get(name, True))
            if other is not False:
                options.append({"type": "object", "properties": {name: other}, "required": [name]})
        return options


def type_of(value: Any) -> str:
    """Return the JSON type of a value."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def key_of(value: Any) -> str:
    """Return a text that is the same for values that JSON Schema takes as equal."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name!r}:{key_of(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(key_of, value)) + "]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{type_of(value)} {value!r}"
