"""Answers against the schema as it was sent, by another program; and what is said where that cannot hold."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output.compiler import GrammarCompiler

pytestmark = pytest.mark.anyio

N = {"type": "integer", "minimum": 0, "maximum": 99}
A_B = {"a": N, "b": N}


def thing(**words: Any) -> dict[str, Any]:
    """Return an object's schema; `not_`, `if_` and `else_` are words that Python has itself."""
    return {"type": "object"} | {word.removesuffix("_"): value for word, value in words.items()}


def closed(**words: Any) -> dict[str, Any]:
    return thing(additionalProperties=False, **words)


ENFORCED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", "c"]}, "minItems": 2},
    "unique booleans": {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}},
    "uniqueItems of one": {"type": "array", "uniqueItems": True, "items": N, "maxItems": 1},
    "contains": {"type": "array", "contains": {"const": 7}, "items": N, "maxItems": 4},
    "minContains": {"type": "array", "contains": {"const": 7}, "minContains": 2, "items": N, "maxItems": 3},
    "not const": {"enum": ["a", "b", "c"], "not": {"const": "a"}},
    "not type": {"type": ["string", "null", "boolean"], "maxLength": 3, "not": {"type": ["null", "string"]}},
    "not required": closed(properties=A_B, not_={"required": ["a"]}),
    "not anyOf": {"enum": [1, 2, 3, "x"], "not": {"anyOf": [{"const": 1}, {"type": "string"}]}},
    "if then else": closed(
        properties={"kind": {"enum": ["x", "y"]}, "n": N},
        required=["kind"],
        if_={"properties": {"kind": {"const": "x"}}, "required": ["kind"]},
        then={"required": ["n"]},
        else_={"properties": {"n": False}},
    ),
    "if then": closed(
        properties={"kind": {"enum": ["x", "y", "z"]}, "n": N},
        if_={"properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]},
        then={"required": ["n"]},
    ),
    "oneOf required": closed(properties=A_B, oneOf=[{"required": ["a"]}, {"required": ["b"]}]),
    "oneOf with a discriminator": {
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {
            "a": closed(properties={"k": {"const": "a"}, "v": N}, required=["k"]),
            "b": closed(properties={"k": {"const": "b"}}, required=["k"]),
        },
    },
    "oneOf types": {"oneOf": [{"type": "string", "maxLength": 3}, N, {"type": "null"}]},
    "unevaluatedProperties": thing(properties={"a": N}, unevaluatedProperties=False),
    "unevaluatedProperties of parts": thing(
        allOf=[{"$ref": "#/$defs/b"}],
        properties={"a": N},
        required=["a", "b"],
        unevaluatedProperties=False,
        **{"$defs": {"b": thing(properties={"b": N})}},
    ),
    "unevaluatedProperties of options": thing(
        properties={"a": N},
        anyOf=[
            {"properties": {"b": N}, "required": ["b"]},
            {"properties": {"c": {"const": 1}}, "required": ["c"]},
        ],
        unevaluatedProperties=False,
    ),
    "dependentRequired": closed(properties=A_B, dependentRequired={"a": ["b"]}),
    "dependentSchemas": closed(
        properties=A_B, dependentSchemas={"a": {"properties": {"b": {"const": 5}}, "required": ["b"]}}
    ),
    "propertyNames": thing(propertyNames={"pattern": "^[ab]$"}, additionalProperties=N, maxProperties=2),
    "propertyNames enum": thing(propertyNames={"enum": ["x", "y"]}, additionalProperties=N),
    "patternProperties": closed(patternProperties={r"^a\d$": N}, maxProperties=3),
    "minProperties": closed(properties=A_B, minProperties=1),
    "prefixItems": {"type": "array", "prefixItems": [N, {"const": "x"}], "items": False, "minItems": 2},
    "older tuples": {"type": "array", "items": [N, {"const": "x"}], "additionalItems": False, "minItems": 2},
    "pydantic optional": {"anyOf": [N, {"type": "null"}], "default": None, "title": "Count"},
    "digits": {"type": "string", "pattern": r"^\d{3}$"},
    "escapes": {"type": "string", "pattern": r"^[^\s\d]\u0041\/\.\-$"},
    "dot": {"type": "string", "pattern": "^.{2}$"},
    "unknown format": {"type": "string", "format": "password", "maxLength": 4},
    "format of a number": {"type": "integer", "format": "int32", "minimum": 0, "maximum": 9},
    "known formats": closed(
        properties={"d": {"type": "string", "format": "date"}, "u": {"type": "string", "format": "uuid"}},
        required=["d", "u"],
    ),
    "a bound beyond all answers": {"type": "string", "maxLength": 10**9, "pattern": "^a{1,3}$"},
    "64-bit numbers": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "all doubles": {"type": "number", "minimum": 0, "maximum": 1.7976931348623157e308},
    "a count as a decimal": {"type": "array", "items": N, "minItems": 2.0, "maxItems": 2.0},
    "recursion": {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": closed(
                properties={"v": N, "c": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 1}},
                required=["v"],
            )
        },
    },
    "own style asked for": {"x-guidance": {"lenient": True}, "type": "array", "items": N, "maxItems": 2},
}


@pytest.mark.parametrize("name", ENFORCED)
async def test_answers_are_valid(
    shared_compiler: GrammarCompiler, answers: Callable[..., list[str]], name: str
) -> None:
    schema = ENFORCED[name]
    grammar = await shared_compiler.compile(Constraint("schema", schema, "guided_json", strict=True))
    assert grammar.relaxed == ()
    validator = jsonschema.Draft202012Validator(schema)
    written = answers(grammar)
    assert len(written) > 6
    if name == "older tuples":
        validator = jsonschema.Draft7Validator(schema)
    for text in written:
        assert not list(validator.iter_errors(json.loads(text))), text


RELAXED: dict[str, tuple[dict[str, Any], str]] = {
    "uniqueItems": ({"type": "array", "items": N, "uniqueItems": True}, "#/uniqueItems"),
    "deep": (
        closed(properties={"tags": {"type": "array", "items": N, "uniqueItems": True}}),
        "#/properties/tags/uniqueItems",
    ),
    "oneOf": ({"oneOf": [N, {"type": "number", "minimum": 5, "maximum": 7}]}, "#/oneOf"),
    "not": ({"type": "string", "maxLength": 3, "not": {"pattern": "^a"}}, "#/not"),
    "if": (thing(if_={"minProperties": 3}, then={"required": ["a"]}, properties=A_B), "#/if"),
    "pattern": ({"type": "string", "pattern": "^(?=a)b", "maxLength": 3}, "#/pattern"),
    "patternProperties": (
        closed(patternProperties={"^a": N, "b$": {"type": "string"}}),
        "#/patternProperties",
    ),
    "maxContains": ({"type": "array", "items": N, "contains": N, "maxContains": 2}, "#/maxContains"),
    "minProperties": (thing(minProperties=2, additionalProperties=N), "#/minProperties"),
    "propertyNames": (thing(propertyNames={"minLength": 2}, additionalProperties=N), "#/propertyNames"),
    "unevaluatedProperties": (
        thing(unevaluatedProperties=False, if_={"required": ["a"]}, properties=A_B),
        "#/unevaluatedProperties",
    ),
}


@pytest.mark.parametrize("name", RELAXED)
async def test_what_cannot_be_enforced_is_named_and_refused_where_strict(
    shared_compiler: GrammarCompiler, answers: Callable[..., list[str]], name: str
) -> None:
    schema, path = RELAXED[name]
    grammar = await shared_compiler.compile(Constraint("schema", schema, "guided_json"))
    assert grammar.relaxed == (path,)
    for text in answers(grammar, seeds=3):
        json.loads(text)
    with pytest.raises(RequestError, match="^'guided_json' at " + path.replace("$", r"\$") + ".*'strict'"):
        await shared_compiler.compile(Constraint("schema", schema, "guided_json", strict=True))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "strnig"},
            "^'guided_json' at #/type: 'strnig' is not one of array, boolean, integer, null, ",
        ),
        (thing(properties={"x": {"type": "strng"}}), "at #/properties/x/type: 'strng' is not one of array"),
        ({"items": {"minimum": "3"}}, "at #/items/minimum: '3' is not a number"),
        (thing(properties={"x": {"minLength": -1}}), "at #/properties/x/minLength: -1 is not a count of 0"),
        ({"anyOf": [N, 5]}, "at #/anyOf/1: 5 is no schema: an object, true or false"),
        ({"anyOf": []}, r"at #/anyOf: \[\] is not a list of at least one schema"),
        (
            {"enum": ["a"], "const": "b"},
            "^'guided_json': no answer can match it: its parts exclude each other$",
        ),
        (
            thing(properties={"x": {"enum": ["a"], "const": "b"}}, required=["x"]),
            "at #/properties/x: no answer can match it",
        ),
        (
            thing(
                properties={"a": N, "x": {"$ref": "#/$defs/x"}},
                required=["x"],
                **{"$defs": {"x": {"type": "integer", "minimum": 5, "maximum": 2}}},
            ),
            r"at #/\$defs/x: no answer can match it: minimum \(5\) is greater than maximum \(2\)$",
        ),
        (
            thing(properties={"x": {"type": "number", "minimum": 1e300}}, required=["x"]),
            "at #/properties/x: .*digit by digit",
        ),
        ({"$ref": "#"}, "no answer can match it"),
        ({"properties": [1]}, "properties"),
        ({"type": "object", "required": 5}, "at #/required: 5 is not a list of names"),
        ({"$ref": "http://127.0.0.1:9/x"}, r"at #/\$ref: 'http://127.0.0.1:9/x' is not fetched"),
        (closed(properties={"a": {"type": "array", "minItems": 10**9}}), "at #/properties/a/minItems: is 1e"),
        ({"enum": list(range(6000))}, "at #/enum: has 6000 values, at most 5000"),
        ({"type": "string", "pattern": "a{1,100000}"}, r"at #/pattern: repeats \{1,100000\}, at most 10000"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "no answer can match it: incompatible types"),
    ],
)
async def test_wrong_schemas_are_refused_with_the_path(
    shared_compiler: GrammarCompiler, schema: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        await shared_compiler.compile(Constraint("schema", schema, "guided_json"))


@pytest.mark.parametrize("bomb", ["allOf", "prefixItems"])
async def test_references_that_double_are_refused(shared_compiler: GrammarCompiler, bomb: str) -> None:
    definitions: dict[str, Any] = {"d0": N}
    for i in range(1, 40):
        pair = [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}", "title": "x"}]
        definitions[f"d{i}"] = {bomb: pair}
    schema = {"$defs": definitions, "$ref": "#/$defs/d39"}
    try:
        await shared_compiler.compile(Constraint("schema", schema, "guided_json"))
    except RequestError as error:
        assert "guided_json" in str(error)
