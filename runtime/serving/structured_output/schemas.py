"""JSON schemas as people write them, in the words that llguidance follows.

pydantic, zod, OpenAPI and MCP servers use words that no grammar can follow. Each is rewritten where there is
a schema that allows the same values, or fewer; otherwise it is dropped, and its path listed as relaxed. An
unknown `format` is an annotation, as the specification has it. Start at `Rewriter.root`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output import limits
from runtime.serving.structured_output.limits import refused
from runtime.serving.structured_output.negation import Definitions, Schema, UnknownNegation
from runtime.serving.structured_output.patterns import from_ecma

FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
"""Those that llguidance enforces."""
ONE, LIST = ("additionalProperties", "additionalItems", "items"), ("anyOf", "oneOf", "allOf", "prefixItems")
MAPPING = ("properties", "patternProperties", "$defs", "definitions")
"""Words with schemas in them: one, a list of them, and a mapping of names to them."""
PLAIN = frozenset({"$ref", "$id", "id", "$anchor", "$schema", "const", "enum", "type", "required"}) | {
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minimum",
    "maximum",
    "multipleOf",
}
"""Words that llguidance takes as they are."""
TAKEN = dict.fromkeys(LIST, list) | dict.fromkeys(MAPPING, dict) | {"pattern": str}
"""Of which type their values must be."""
MOST_UNIQUE = 5
"""Values of which all orders are written out: 325 lists."""
MOST_DEPENDENCIES = 6
MOST_NUMBER = 9 * 10**18
"""What bounds of numbers are lowered to: llguidance does not follow larger ones."""


class Rewriter:
    """Rewrites one schema; `relaxed` are the paths of what is not enforced."""

    def __init__(self, constraint: Constraint, *, takes: Callable[[Schema], bool]) -> None:
        """`takes` says whether llguidance takes a small schema."""
        self._constraint = constraint
        self._takes = takes
        self._definitions = Definitions(constraint.value)
        self.relaxed: list[str] = []

    def root(self) -> Schema:
        """Return the schema for llguidance; RequestError where it is beyond limits, or strict and relaxed."""
        return self._schema(self._constraint.value, "#")

    def _relax(self, path: str, word: str) -> None:
        at = f"{path}/{word}"
        if self._constraint.strict:
            raise refused(self._constraint, f"'{word}' cannot be enforced here; leave out 'strict'", at)
        self.relaxed.append(at)

    def _schema(self, schema: Schema, path: str) -> Schema:
        if not isinstance(schema, dict):
            return schema
        self._check(schema, path)
        made: dict[str, Any] = {}
        for word, value in schema.items():
            if word in PLAIN:
                made[word] = value
            elif word in ONE:
                made[word] = self._one(value, f"{path}/{word}")
            elif word in TAKEN and not isinstance(value, TAKEN[word]):
                made[word] = value  # llguidance says what is wrong
            elif word in LIST:
                made[word] = [self._schema(part, f"{path}/{word}/{i}") for i, part in enumerate(value)]
            elif word in MAPPING:
                made[word] = {
                    name: self._schema(part, f"{path}/{word}/{name}") for name, part in value.items()
                }
        if "json-schema.org" not in str(made.get("$schema", "json-schema.org")):
            del made["$schema"]
        for rule in (self._numbers, self._strings, self._arrays, self._objects, self._names, self._choices):
            rule(schema, made, path)
        return made

    def _one(self, value: Any, path: str) -> Any:
        if isinstance(value, list):  # `items` before 2020-12
            return [self._schema(part, f"{path}/{i}") for i, part in enumerate(value)]
        return self._schema(value, path)

    def _check(self, schema: dict[str, Any], path: str) -> None:
        for word in ("minLength", "minItems", "minProperties", "minContains"):
            if isinstance(count := schema.get(word), int | float) and count > limits.MAX_COUNT:
                raise refused(self._constraint, f"is {count:g}, at most {limits.MAX_COUNT}", f"{path}/{word}")
        if isinstance(values := schema.get("enum"), list) and len(values) > limits.MAX_ENUM_TEXTS:
            most = limits.MAX_ENUM_TEXTS
            raise refused(self._constraint, f"has {len(values)} values, at most {most}", f"{path}/enum")
        reference = schema.get("$ref")
        if isinstance(reference, str) and "://" in reference and reference.split("#")[0] not in self._ids():
            raise refused(
                self._constraint, f"'{reference}' is not fetched; put it under $defs", f"{path}/$ref"
            )

    def _ids(self) -> set[str]:
        root = self._constraint.value
        parts = [root, *(root.get("$defs") or {}).values(), *(root.get("definitions") or {}).values()]
        return {str(part.get("$id")) for part in parts if isinstance(part, dict)}

    def _numbers(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Lower the bounds that llguidance cannot follow and no answer reaches: 64-bit integers."""
        for word, sign in (
            ("maximum", 1),
            ("exclusiveMaximum", 1),
            ("minimum", -1),
            ("exclusiveMinimum", -1),
        ):
            if isinstance(bound := schema.get(word), int | float) and sign * bound > MOST_NUMBER:
                made[word] = sign * MOST_NUMBER

    def _strings(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        for word in ("minLength", "maxLength"):
            if word in schema:
                made[word] = _at_most(schema[word], limits.MAX_COUNT)
        if schema.get("format") in FORMATS:
            made["format"] = schema["format"]
        if isinstance(pattern := schema.get("pattern"), str):
            limits.check_pattern(pattern, self._constraint, f"{path}/pattern")
            translated = from_ecma(pattern)
            if self._takes({"type": "string", "pattern": translated}):
                made["pattern"] = translated
            else:
                self._relax(path, "pattern")

    def _arrays(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        for word in ("minItems", "maxItems"):
            if word in schema:
                made[word] = _at_most(schema[word], limits.MAX_COUNT)
        if schema.get("unevaluatedItems") is not None and "items" not in schema:
            if schema.keys() & {"allOf", "anyOf", "oneOf", "$ref", "if", "contains"}:
                self._relax(path, "unevaluatedItems")
            else:
                made["items"] = self._schema(schema["unevaluatedItems"], f"{path}/unevaluatedItems")
        if "contains" in schema:
            self._contains(schema, made, path)
        if schema.get("uniqueItems") is True and not self._is_short(schema):
            self._unique(schema, made, path)

    def _is_short(self, schema: dict[str, Any]) -> bool:
        return isinstance(most := schema.get("maxItems"), int) and most <= 1

    def _contains(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Have the first items match `contains`: it says that some do, and not where."""
        least = schema.get("minContains", 1)
        if schema.get("maxContains") is not None:
            self._relax(path, "maxContains")
        if not isinstance(least, int) or least > MOST_UNIQUE or "prefixItems" in schema:
            return self._relax(path, "contains")
        if least > 0:
            item = self._schema(schema["contains"], f"{path}/contains")
            every = made.get("items", True)
            if isinstance(every, list):
                return self._relax(path, "contains")
            first = item if every is True else {"allOf": [every, item]}
            made["prefixItems"] = [first] * least
            made["minItems"] = max(least, made.get("minItems") or 0)
        return None

    def _unique(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Write out all lists of different values, where those are few."""
        values = self._definitions.values(schema.get("items"))
        others = {"prefixItems", "contains"} & schema.keys()
        if values is None or len(values) > MOST_UNIQUE or others or schema.get("type") != "array":
            return self._relax(path, "uniqueItems")
        least, most = made.pop("minItems", 0), min(made.pop("maxItems", len(values)), len(values))
        made.pop("items")
        lists = [
            {"prefixItems": [{"const": value} for value in order], "items": False, "minItems": count}
            for count in range(int(least), int(most) + 1)
            for order in itertools.permutations(values, count)
        ]
        _also(made, {"anyOf": [{"type": "array", **each} for each in lists]} if lists else False)
        return None

    def _objects(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        required = [name for name in schema.get("required") or () if isinstance(name, str)]
        properties = schema.get("properties") or {}
        closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
        least, most = schema.get("minProperties", 0), schema.get("maxProperties", math.inf)
        if least > len(required):
            if properties.keys() - set(required) or not closed:
                self._some_properties(made, path, properties=list(properties), least=least, closed=closed)
            else:
                made["minProperties"] = least
        if not (closed and most >= len(properties)) and most < math.inf:
            if properties.keys() - set(required):
                self._relax(path, "maxProperties")
            else:
                made["maxProperties"] = most
        if schema.get("unevaluatedProperties") is not None and "additionalProperties" not in schema:
            self._unevaluated(schema, made, path)
        self._dependencies(schema, made, path, required)

    def _some_properties(
        self, made: dict[str, Any], path: str, *, properties: list[str], least: int, closed: bool
    ) -> None:
        if least == 1 and closed:
            return _also(made, {"anyOf": [{"required": [name]} for name in properties]})
        if not properties:
            made["minProperties"] = least
            if least == 1:
                return None
        return self._relax(path, "minProperties")  # a key may be written twice

    def _unevaluated(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Allow the properties that the schema and the parts of it name, and no others."""
        names = self._named(schema)
        if schema["unevaluatedProperties"] is not False or names is None:
            return self._relax(path, "unevaluatedProperties")
        options = [word for word in ("anyOf", "oneOf") if word in schema]
        if schema.keys() & {"if", "dependentSchemas", "dependencies"} or len(options) > 1:
            return self._relax(path, "unevaluatedProperties")
        for word in options:
            for i, (part, own) in enumerate(zip(schema[word], made[word], strict=True)):
                more = self._named(part)
                if more is None:
                    return self._relax(path, "unevaluatedProperties")
                made[word][i] = {"allOf": [own, _only(names | more)]}
        if not options:
            _also(made, _only(names))
        return None

    def _named(self, schema: Schema, depth: int = 0) -> dict[str, Any] | None:
        """Return the properties that a schema names, None where that depends on the value."""
        schema = self._definitions.resolved(schema)
        if not isinstance(schema, dict):
            return {}
        if depth > 8 or schema.keys() & {"additionalProperties", "patternProperties"}:
            return None
        names: dict[str, Any] = dict.fromkeys(schema.get("properties") or {}, True)
        parts = list(schema.get("allOf") or ())
        if "$ref" in schema:
            parts.append({"$ref": schema["$ref"]})
        for part in parts:
            more = self._named(part, depth + 1)
            if more is None:
                return None
            names |= more
        return names

    def _dependencies(
        self, schema: dict[str, Any], made: dict[str, Any], path: str, required: list[str]
    ) -> None:
        """Have a property be absent, or what depends on it be true."""
        for word in ("dependentRequired", "dependentSchemas", "dependencies"):
            dependencies = schema.get(word) or {}
            if len(dependencies) > MOST_DEPENDENCIES:
                self._relax(path, word)
                continue
            for name, then in dependencies.items():
                if isinstance(then, list):
                    rest: Schema = {"required": [each for each in then if isinstance(each, str)]}
                else:
                    rest = self._schema(then, f"{path}/{word}/{name}")
                absent = {"properties": {name: False}}
                _also(made, rest if name in required else {"anyOf": [absent, rest]})

    def _names(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Make `propertyNames` a pattern of the properties that are not named."""
        names = self._definitions.resolved(schema.get("propertyNames"))
        if not isinstance(names, dict) or not names.keys() - {"type", "title", "description"}:
            return None
        every = made.get("additionalProperties", True)
        values = self._definitions.values(names)
        free = not made.get("properties") and not made.get("patternProperties")
        if free and values is not None:
            made["properties"] = {name: every for name in values if isinstance(name, str)}
        elif free and isinstance(names.get("pattern"), str) and names.keys() <= {"type", "pattern", "title"}:
            limits.check_pattern(names["pattern"], self._constraint, f"{path}/propertyNames")
            pattern = from_ecma(names["pattern"])
            if not self._takes({"patternProperties": {pattern: True}, "additionalProperties": False}):
                return self._relax(path, "propertyNames")
            made["patternProperties"] = {pattern: every}
        else:
            return self._relax(path, "propertyNames")
        made["additionalProperties"] = False
        return None

    def _choices(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        if "patternProperties" in schema and "patternProperties" in made:
            self._patterns(schema, made, path)
        if isinstance(schema.get("oneOf"), list):
            self._one_of(schema, made, path)
        if "not" in schema:
            self._enforce(made, path, "not", lambda: self._definitions.negated(schema["not"], schema))
        if "if" in schema and schema.keys() & {"then", "else"}:
            self._enforce(made, path, "if", lambda: self._either(schema))
        for word in ("$dynamicRef", "$recursiveRef"):
            if word in schema:
                self._relax(path, word)

    def _enforce(self, made: dict[str, Any], path: str, word: str, part: Callable[[], Schema]) -> None:
        try:
            _also(made, self._schema(part(), f"{path}/{word}"))
        except UnknownNegation:
            self._relax(path, word)

    def _either(self, schema: dict[str, Any]) -> Schema:
        """Return `if` with `then`, or what does not match `if` with `else`."""
        other = self._definitions.negated(schema["if"], schema)
        if other is False:
            return {"allOf": [schema["if"], schema.get("then", True)]}
        return {
            "anyOf": [
                {"allOf": [schema["if"], schema.get("then", True)]},
                {"allOf": [other, schema.get("else", True)]},
            ]
        }

    def _one_of(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Make `oneOf` an `anyOf` of options that exclude each other."""
        options, own = schema["oneOf"], made.pop("oneOf")
        known = self._definitions
        beside = {word: value for word, value in schema.items() if word != "oneOf"}
        try:
            for i, j in itertools.permutations(range(len(options)), 2):
                if not known.disjoint(options[i], options[j]):
                    but = known.negated(options[j], {**beside, **_mapping(known.resolved(options[i]))})
                    own[i] = {"allOf": [own[i], self._schema(but, f"{path}/oneOf/{i}")]}
        except UnknownNegation:
            self._relax(path, "oneOf")
            own = [self._schema(part, f"{path}/anyOf/{i}") for i, part in enumerate(options)]
        if "anyOf" in made:
            _also(made, {"anyOf": own})
        else:
            made["anyOf"] = own

    def _patterns(self, schema: dict[str, Any], made: dict[str, Any], path: str) -> None:
        """Translate the patterns of names; llguidance wants them to exclude each other."""
        for pattern in schema["patternProperties"]:
            limits.check_pattern(pattern, self._constraint, f"{path}/patternProperties")
        parts = {from_ecma(name): part for name, part in made["patternProperties"].items()}
        if self._takes({"patternProperties": dict.fromkeys(parts, True)}):
            made["patternProperties"] = parts
            return
        del made["patternProperties"]
        made.pop("additionalProperties", None)  # it is about the names that match none of them
        self._relax(path, "patternProperties")


def _also(made: dict[str, Any], more: Schema) -> None:
    """Have `made` require `more`, too."""
    made["allOf"] = [*made.get("allOf", ()), more]


def _only(names: dict[str, Any]) -> dict[str, Any]:
    return {"properties": names, "additionalProperties": False}


def _mapping(schema: Schema) -> dict[str, Any]:
    return schema if isinstance(schema, dict) else {}


def _at_most(count: Any, most: int) -> Any:
    """Return a bound, lowered where no answer reaches it: a smaller one allows no value that it forbids."""
    if isinstance(count, float) and count.is_integer():  # 3.0 is a count, too
        count = int(count)
    return min(count, most) if isinstance(count, int | float) else count
