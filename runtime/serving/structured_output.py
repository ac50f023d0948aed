"""Constrained answers: JSON, JSON of a schema, a regular expression, or one of some texts.

A grammar says after each token which ones may come next; the sampler drops the others. Knows grammars
through llguidance (extra `guided`) and token ids; does not know routes or engines. Start at
`GrammarCompiler.compile`.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError, one_line
from runtime.serving.engine.protocol import Constraint, Grammar

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


def json_object(param: str) -> Constraint:
    """Return the constraint that the answer is a JSON object."""
    return Constraint("schema", {"type": "object"}, param)


def function_call(functions: Iterable[tuple[str, dict[str, Any] | None]], param: str) -> Constraint:
    """Return the constraint that the answer calls one of `functions`: (name, schema of its arguments)."""
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
    """Compiles constraints for one tokenizer, whose vocabulary is read when the first one is compiled."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._vocabulary: LLTokenizer | None = None

    def compile(self, constraint: Constraint) -> Grammar:
        """Return the grammar of `constraint`; blocks while it is built.

        Raises RequestError: it is not well-formed, too complex, or the library is not installed.
        """
        param = constraint.param
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(
                f"'{param}' needs the extra 'guided' (pip install llguidance), which this server lacks",
                param=param,
            ) from None
        try:
            if constraint.kind == "regex":
                grammar = LLMatcher.grammar_from_regex(constraint.value)
            else:
                schema = json.dumps(constraint.value)
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        except ValueError as error:
            raise RequestError(f"'{param}': {one_line(error)}", param=param) from None
        matcher = LLMatcher(self._tokens(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"'{param}': {one_line(matcher.get_error())}", param=param)
        return Grammar(constraint, lambda: _GrammarMask(matcher.deep_copy(), param))

    def _tokens(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        if self._vocabulary is None:
            self._vocabulary = from_tokenizer(
                self._tokenizer,  # type: ignore[arg-type]  # a fast tokenizer, as every one loaded here is
                eos_token=sorted(self._stop_ids) or None,
            )
        return self._vocabulary


class _GrammarMask:
    """One answer's position in its grammar; the engine's `Mask`."""

    def __init__(self, matcher: "LLMatcher", param: str) -> None:
        self._matcher = matcher
        self._param = param

    def allowed(self) -> bytes:
        """Return one byte per token, 0 where it may not come next."""
        allowed = self._matcher.compute_logit_bias()
        if self._matcher.is_error():  # it ran into the limits that keep a grammar from using up the machine
            raise RequestError(
                f"'{self._param}' is too complex: {one_line(self._matcher.get_error())}", param=self._param
            )
        return allowed

    def take(self, token: int) -> None:
        """Advance past `token`."""
        self._matcher.consume_token(token)
