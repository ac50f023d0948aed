"""Every way to say what an answer must match: the fields, and the constraint that they mean.

OpenAI's `response_format`, with the `schema` of Together, Fireworks and llama.cpp; vLLM's
`structured_outputs` and `guided_*`; llama.cpp's `json_schema` and `grammar`; TGI's `grammar`; SGLang's
`regex` and `ebnf`. Does not know routes, or how a grammar is followed. Start at `constraint`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field, Tag
from starlette.requests import Request

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint, Sampling
from runtime.serving.http import fields
from runtime.serving.http.body_types import Body, Flag, Name, ShortText, Text, by_kind
from runtime.serving.http.json_parser import parse
from runtime.serving.http.sse import unless_gone
from runtime.serving.structured_output.constraints import json_object, one_of
from runtime.serving.structured_output.limits import MAX_FORM_BYTES, MAX_PATTERN_CHARACTERS
from runtime.serving.tokenizer import PromptTokenizer

RELAXED = "x-relaxed-schema"
"""The header of an answer that lists the paths of what the schema asks for and no grammar can enforce."""
MOST_RELAXED = 16
"""Paths in it."""
MAX_CHOICE_TEXTS = 256

Pattern = Annotated[Text, Field(max_length=MAX_PATTERN_CHARACTERS)]
FormText = Annotated[Text, Field(max_length=MAX_FORM_BYTES)]
Choices = Annotated[list[ShortText], Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)]
SchemaOrText = Annotated[
    Annotated[dict[str, Any], Tag("<schema>")] | Annotated[FormText, Tag("<text>")],
    by_kind("a JSON schema, or one as text", {dict: "<schema>", str: "<text>"}),
]


class JsonSchema(Body):
    """The schema of `response_format`."""

    name: Name = "answer"
    description: Text | None = None
    """Ignored."""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """None is any object."""
    strict: Flag = False
    """Refuse a schema that cannot be enforced in all its parts."""


class ResponseFormat(Body):
    """What the answer must be: text, json_object, json_schema, regex or grammar."""

    treatments = fields.FORM

    type: Name = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """Of a json_object or json_schema, as Together, Fireworks and llama.cpp spell it."""
    grammar: FormText | None = None
    pattern: Pattern | None = None
    value: SchemaOrText | None = None
    """TGI's name for the schema or pattern."""


class StructuredOutputs(Body):
    """vLLM's way to say it: one of these."""

    treatments = fields.STRUCTURED

    json_: SchemaOrText | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: FormText | None = None
    json_object: Flag = False
    whitespace_pattern: Pattern | None = None
    """What may stand between the parts of JSON."""


class TgiGrammar(Body):
    """TGI's way to say it."""

    type: Literal["json", "json_schema", "regex"]
    value: SchemaOrText


class ConstraintFields(Body):
    """What the answer must match; one of these, and none is free text."""

    response_format: ResponseFormat | None = None
    """What the answer must be: text, json_object, json_schema, regex or grammar."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's name for the same: json, regex, choice, grammar or json_object."""
    guided_json: SchemaOrText | None = None
    """The same as a response_format json_schema with this schema."""
    guided_regex: Pattern | None = None
    """A regular expression that the answer matches as a whole."""
    guided_choice: Choices | None = None
    """The answer is one of these texts."""
    guided_grammar: FormText | None = None
    """A grammar in Lark's or llama.cpp's notation (GBNF)."""
    guided_whitespace_pattern: Pattern | None = None
    """What may stand between the parts of JSON."""
    guided_json_object: Flag = False
    """The same as a response_format json_object."""
    regex: Pattern | None = None
    """SGLang's name for `guided_regex`."""
    ebnf: FormText | None = None
    """SGLang's name for `guided_grammar`."""
    json_schema: SchemaOrText | None = None
    """llama.cpp's and SGLang's name for `guided_json`."""
    grammar: (
        Annotated[
            Annotated[FormText, Tag("<text>")] | Annotated[TgiGrammar, Tag("<grammar>")],
            by_kind("a grammar, or an object with its type and value", {str: "<text>", dict: "<grammar>"}),
        ]
        | None
    ) = None
    """llama.cpp's name for `guided_grammar`; TGI's for a schema or pattern."""


def constraint(body: ConstraintFields, *, format_param: str = "response_format") -> Constraint | None:
    """Return the constraint that a request asks for, None for free text.

    `format_param` is what the route calls its `response_format`.
    Raises RequestError for an unknown response_format, more than one constraint, or white space of what is
    not JSON.
    """
    found = list(_constraints(body, format_param))
    if len(found) > 1:
        raise exclusive(found[0].param, found[1].param)
    return _spaced(found[0], body.guided_whitespace_pattern, "guided_whitespace_pattern") if found else None


def exclusive(first: str, second: str) -> RequestError:
    """Return the refusal of two fields that both say what the answer must match."""
    return RequestError(f"'{first}' and '{second}' exclude each other", param=second)


def _spaced(asked: Constraint, space: str | None, param: str) -> Constraint:
    """Return the constraint of JSON with `space` between its parts; RequestError for one of anything else."""
    if space is None:
        return asked
    if asked.kind != "schema":
        raise RequestError(f"'{param}' is for JSON, and '{asked.param}' is a {asked.kind}", param=param)
    return replace(asked, whitespace=space)


def _constraints(body: ConstraintFields, format_param: str) -> Iterator[Constraint]:
    if body.response_format is not None:
        yield from _of_format(body.response_format, format_param)
    if body.structured_outputs is not None:
        yield from _of_vllm(body.structured_outputs)
    for name in ("guided_json", "json_schema"):
        if (value := getattr(body, name)) is not None:
            yield _schema(value, name)
    if body.guided_json_object:
        yield json_object("guided_json_object")
    for name in ("guided_regex", "regex"):
        if (value := getattr(body, name)) is not None:
            yield Constraint("regex", value, name)
    if body.guided_choice is not None:
        yield one_of(body.guided_choice, "guided_choice")
    for name in ("guided_grammar", "ebnf"):
        if value := getattr(body, name):
            yield Constraint("grammar", value, name)
    if isinstance(body.grammar, TgiGrammar):
        yield _typed(body.grammar.type, body.grammar.value, "grammar")
    elif body.grammar:
        yield Constraint("grammar", body.grammar, "grammar")


def _of_vllm(asked: StructuredOutputs) -> Iterator[Constraint]:
    for found in _structured(asked, "structured_outputs"):
        yield _spaced(found, asked.whitespace_pattern, "structured_outputs.whitespace_pattern")


def _structured(asked: StructuredOutputs, param: str) -> Iterator[Constraint]:
    if asked.json_ is not None:
        yield _schema(asked.json_, f"{param}.json")
    if asked.json_object:
        yield json_object(f"{param}.json_object")
    if asked.regex is not None:
        yield Constraint("regex", asked.regex, f"{param}.regex")
    if asked.choice is not None:
        yield one_of(asked.choice, f"{param}.choice")
    if asked.grammar:
        yield Constraint("grammar", asked.grammar, f"{param}.grammar")


def _of_format(asked: ResponseFormat, param: str) -> Iterator[Constraint]:
    inner = asked.json_schema
    if inner is not None and asked.schema_ is not None:
        raise exclusive(f"{param}.schema", f"{param}.json_schema")
    schema = asked.schema_ if inner is None else inner.schema_
    match asked.type:
        case "text":
            return
        case "json_object" | "json_schema" if schema is not None:
            yield Constraint("schema", schema, param, strict=inner is not None and inner.strict)
        case "json_object" | "json_schema" if asked.type == "json_object" or inner is not None:
            yield json_object(param)
        case "json_schema" if asked.value is None:
            raise RequestError("response_format json_schema needs 'json_schema'", param=param)
        case "grammar" if asked.grammar:
            yield Constraint("grammar", asked.grammar, param)
        case "regex" if asked.pattern is not None:
            yield Constraint("regex", asked.pattern, param)
        case "json" | "json_schema" | "regex" if asked.value is not None:
            yield _typed(asked.type, asked.value, param)
        case "regex" | "grammar":
            needed = "pattern" if asked.type == "regex" else "grammar"
            raise RequestError(f"response_format {asked.type} needs '{needed}'", param=param)
        case other:
            raise RequestError(
                f"response_format '{other}' is not one of text, json_object, json_schema, regex, grammar",
                param=param,
            )


def _typed(kind: str, value: dict[str, Any] | str, param: str) -> Constraint:
    if kind != "regex":
        return _schema(value, param)
    if not isinstance(value, str):
        raise RequestError(f"'{param}' of type regex needs a pattern as 'value'", param=param)
    return Constraint("regex", value, param)


def _schema(value: dict[str, Any] | str, param: str) -> Constraint:
    if isinstance(value, str):
        try:
            value = parse(value.encode(), what="the text")
        except RequestError as error:
            raise RequestError(f"'{param}' is not a JSON schema: {error}", param=param) from None
        if not isinstance(value, dict):
            raise RequestError(f"'{param}' is not a JSON schema: it is no object", param=param)
    return Constraint("schema", value, param)


async def constrained(
    request: Request, tokenizer: PromptTokenizer, sampling: Sampling, asked: Constraint | None
) -> Sampling:
    """Return `sampling` with the grammar of `asked`; given up where the client leaves before it is compiled.

    Keeps for the answer's header what of a schema is not enforced.
    """
    if asked is None:
        return sampling
    work = tokenizer.constrained(sampling, asked)
    made = await unless_gone(request, work, request_id=request.state.request_id)
    if made.grammar is not None and made.grammar.relaxed:
        request.state.relaxed = made.grammar.relaxed
    return made


def relaxed_header(request: Request) -> str | None:
    """Return the value of the header RELAXED, None where all is enforced."""
    paths: tuple[str, ...] = getattr(request.state, "relaxed", ())
    shown = [quote(path[:200], safe="#/$*~") for path in paths[:MOST_RELAXED]]
    return ", ".join(shown + ["..."] * (len(paths) > MOST_RELAXED)) or None
