"""From a constraint to llguidance's grammar: what a form's process does first.

Runs in the process that may be killed; a server only imports it. Start at `form_of`.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError, one_line
from runtime.serving.engine.protocol import JSON_STYLE, Constraint
from runtime.serving.structured_output import limits
from runtime.serving.structured_output.faults import culprit, malformed
from runtime.serving.structured_output.limits import refused
from runtime.serving.structured_output.negation import Schema
from runtime.serving.structured_output.patterns import from_ecma
from runtime.serving.structured_output.schemas import Rewriter

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

EXHAUSTED = ("fuel", "too many", "too complex", "too large", "unable to determine", "limit")
"""In the texts of llguidance's errors that come from its limits."""

SCHEMA_ERRORS = {
    "Regex is empty": "no answer can match it: its parts exclude each other",
    "Failed to generate regex for": "bounds that cannot be followed digit by digit; choose others",
}
"""What llguidance's words for a wrong schema mean, by a part of them."""

PLACE = re.compile(r"\s*while processing json-schema:///(#\S*)")
"""What llguidance adds to errors behind a reference."""


@dataclass(frozen=True, slots=True)
class Form:
    """A constraint as llguidance takes it."""

    grammar: str
    value: Any
    """What is enforced, in the words of the constraint's kind."""
    relaxed: tuple[str, ...] = ()
    """Paths of a schema whose keyword is not enforced."""


def form_of(constraint: Constraint) -> Form:
    """Return the form of `constraint`; RequestError where it is not well-formed."""
    from llguidance import LLMatcher

    if constraint.kind == "answer":
        return _of_parts(constraint)
    if constraint.kind == "regex":
        limits.check_pattern(constraint.value, constraint)
        return Form(LLMatcher.grammar_from_regex(from_ecma(constraint.value)), constraint.value)
    if constraint.kind == "grammar":
        return Form(LLMatcher.grammar_from_lark(_lark(constraint)), constraint.value)
    rewriter = Rewriter(constraint, takes=_takes)
    try:
        schema = rewriter.root()
    except (AttributeError, KeyError, TypeError, ValueError):  # words with values of other types
        path, reason = malformed(constraint.value) or ("", "is not a well-formed JSON schema")
        raise refused(constraint, reason, path) from None
    style = dict(JSON_STYLE)
    if constraint.whitespace is not None:
        limits.check_pattern(constraint.whitespace, constraint)
        style = {"whitespace_flexible": True, "whitespace_pattern": constraint.whitespace}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=style)  # type: ignore[arg-type]
    return Form(grammar, schema, tuple(rewriter.relaxed))


def _of_parts(constraint: Constraint) -> Form:
    """Return the form of an answer: its grammar, with each part as a grammar of its own."""
    top, grammars, parts, relaxed = constraint.value["top"], list[dict[str, Any]](), [], list[str]()
    for number, each in enumerate(constraint.value["parts"]):
        part = replace(constraint, **each)
        form = form_of(part)
        if part.kind == "schema" and (error := _error(form.grammar)):
            raise _wrong(form, error, part)
        known = part.kind == "grammar"
        made = {"lark_grammar": form.grammar} if known else json.loads(form.grammar)["grammars"][0]
        grammars.append({**made, "name": f"sub{number}"})
        top += f"\npart{number}: @sub{number}"
        parts.append({**each, "value": form.value})
        relaxed += form.relaxed
    value = {"top": constraint.value["top"], "parts": parts}
    return Form(json.dumps({"grammars": [{"lark_grammar": top}, *grammars]}), value, tuple(relaxed))


def _error(grammar: str) -> str:
    """Return what is wrong with a grammar, "" for nothing."""
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return "\n".join(messages) if wrong else ""


def _takes(schema: Schema) -> bool:
    """Return whether llguidance takes a small schema."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return not LLMatcher.validate_grammar_with_warnings(grammar)[0]


def _lark(constraint: Constraint) -> str:
    """Return a grammar in Lark's notation; llama.cpp's (GBNF, its rules written with `::=`) is translated."""
    from runtime.serving.structured_output.notations import to_lark

    try:
        return to_lark(constraint.value)
    except Exception as error:  # llguidance's parser raises what it meets
        raise refused(
            constraint, f"is no grammar in Lark's or llama.cpp's notation: {one_line(error)}"
        ) from None


def matcher(form: Form, tokens: "LLTokenizer", constraint: Constraint) -> "LLMatcher":
    """Return what follows `form` for a vocabulary; RequestError where it is wrong or beyond the limits."""
    from llguidance import LLMatcher, LLParserLimits

    parser_limits = LLParserLimits(verbose_errors=False, **limits.PARSER_LIMITS)  # type: ignore[arg-type]
    made = LLMatcher(tokens, form.grammar, log_level=0, limits=parser_limits)
    if constraint.kind == "schema" and made.is_error():
        raise _wrong(form, made.get_error(), constraint)
    _check(made, constraint)
    return made


def _wrong(form: Form, error: str, constraint: Constraint) -> RequestError:
    """Return why a schema is refused, with the path of what is wrong where one part is."""
    if found := malformed(constraint.value):
        path, reason = found
        return refused(constraint, reason, path)
    if _is_exhausted(error):
        return refused(constraint, said(error))
    place = PLACE.search(error)
    path = place[1] if place else culprit(form.value, _takes)
    return refused(constraint, said(PLACE.sub("", error)), path)


def mask(made: "LLMatcher", constraint: Constraint) -> bytes:
    """Return the first mask, a bit a token; RequestError where it is beyond the limits."""
    bits = made.compute_bitmask()
    _check(made, constraint)
    return bits


def _check(made: "LLMatcher", constraint: Constraint) -> None:
    if made.is_error():
        raise refused(constraint, said(made.get_error()))


def _is_exhausted(error: str) -> bool:
    return any(word in error.lower() for word in EXHAUSTED)


def said(error: str) -> str:
    """Return what llguidance says, and its limits where one was reached."""
    text = one_line(error.replace("<non-verbose/>", ""))
    if text.startswith("NoExtension"):
        return "no answer can match it"
    if text.startswith("panic"):
        return "llguidance, which follows it, fails on it by a fault of its own; write it in another way"
    for part, meaning in SCHEMA_ERRORS.items():
        if part in text:
            return meaning
    text = text.replace("Unsatisfiable schema:", "no answer can match it:")
    if _is_exhausted(text):
        names = ", ".join(f"{name} {value}" for name, value in limits.PARSER_LIMITS.items())
        return f"too complex: {text} (limits: {names})"
    return text
