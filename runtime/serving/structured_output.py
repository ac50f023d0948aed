"""Answers that must have a form: JSON, JSON of a schema, a pattern, or one of some texts.

A grammar says at each place which tokens may come; the sampler drops the others. Knows grammars through
llguidance (extra `guided`) and token ids; does not know routes or engines. Start at
`GrammarCompiler.compile`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Grammar
from runtime.serving.http.schema import SamplingFields

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase

JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""One spelling, Python's, which models have seen most: free white space lets a weak model go on for ever."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form one answer must have, and the field of the request that asks for it."""

    kind: Literal["schema", "regex"]
    value: Any
    """A JSON schema as a mapping, or a regular expression."""
    param: str


def constraint_of(fields: SamplingFields) -> Constraint | None:
    """Return the form that a request asks for, None for free text; RequestError for two or an unknown one."""
    forms = []
    if (asked := fields.response_format) is not None and asked.type != "text":
        if asked.type not in {"json_object", "json_schema"}:
            raise RequestError(
                f"response_format '{asked.type}' is not one of text, json_object, json_schema",
                param="response_format",
            )
        if asked.type == "json_schema" and asked.json_schema is None:
            raise RequestError("response_format json_schema needs 'json_schema'", param="response_format")
        schema = asked.json_schema.schema_ if asked.type == "json_schema" and asked.json_schema else None
        forms.append(
            json_object("response_format")
            if schema is None
            else Constraint("schema", schema, "response_format")
        )
    if fields.guided_json is not None:
        forms.append(Constraint("schema", fields.guided_json, "guided_json"))
    if fields.guided_regex is not None:
        forms.append(Constraint("regex", fields.guided_regex, "guided_regex"))
    if fields.guided_choice is not None:
        either = "|".join(f"(?:{re.escape(text)})" for text in fields.guided_choice)
        forms.append(Constraint("regex", either, "guided_choice"))
    if len(forms) > 1:
        raise RequestError(
            f"'{forms[0].param}' and '{forms[1].param}' exclude each other", param=forms[1].param
        )
    return forms[0] if forms else None


def json_object(param: str) -> Constraint:
    """Return the form of any JSON object."""
    return Constraint("schema", {"type": "object"}, param)


def call_to(functions: Iterable[tuple[str, dict[str, Any] | None]], param: str) -> Constraint:
    """Return the form of a call to one of some functions, given as (name, schema of its arguments)."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in functions
    ]
    return Constraint("schema", calls[0] if len(calls) == 1 else {"anyOf": calls}, param)


class GrammarCompiler:
    """Compiles forms for one tokenizer, which is taken apart when the first form is asked for."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._vocabulary: LLTokenizer | None = None

    def compile(self, form: Constraint) -> Grammar:
        """Return the grammar of `form`; blocks while it is built.

        Raises RequestError: a form that is not well-formed, too complex, or no library for it here.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(
                f"'{form.param}' needs the extra 'guided' (pip install llguidance), which this server lacks",
                param=form.param,
            ) from None
        try:
            if form.kind == "regex":
                grammar = LLMatcher.grammar_from_regex(form.value)
            else:
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(form.value), overrides=JSON_STYLE)
        except ValueError as error:
            raise RequestError(f"'{form.param}': {_reason(str(error))}", param=form.param) from None
        matcher = LLMatcher(self._words(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"'{form.param}': {_reason(matcher.get_error())}", param=form.param)
        return Grammar(form.kind, form.value, lambda: _Matched(matcher.deep_copy(), form.param))

    def _words(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        if self._vocabulary is None:
            self._vocabulary = from_tokenizer(
                self._tokenizer,  # type: ignore[arg-type]  # a fast tokenizer, as every one loaded here is
                eos_token=sorted(self._stop_ids) or None,
            )
        return self._vocabulary


class _Matched:
    """One answer's place in its grammar."""

    def __init__(self, matcher: "LLMatcher", param: str) -> None:
        self._matcher = matcher
        self._param = param

    def allowed(self) -> bytes:
        """Return one byte a token, 0 where it may not come."""
        allowed = self._matcher.compute_logit_bias()
        if self._matcher.is_error():  # it ran into the limits that keep a grammar from taking the machine
            raise RequestError(
                f"'{self._param}' is too complex: {_reason(self._matcher.get_error())}", param=self._param
            )
        return allowed

    def take(self, token: int) -> None:
        """Go on behind `token`."""
        self._matcher.consume_token(token)


def _reason(text: str) -> str:
    return " ".join(text.split())[:300]
