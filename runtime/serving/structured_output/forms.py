"""From a constraint to llguidance's grammar: what a form's process does first.

Runs in the process that may be killed; a server only imports it. Start at `form_of`.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import one_line
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output import limits
from runtime.serving.structured_output.limits import refused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""One spelling, Python's, which models have seen most: free white space lets a weak model go on for ever."""
REPETITION = re.compile(r"(?<!\\)\{(\d*)(?:,(\d*))?\}")
EXHAUSTED = ("fuel", "too many", "too complex", "too large", "unable to determine", "limit")
"""In the texts of llguidance's errors that come from its limits."""


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

    if constraint.kind == "regex":
        check_pattern(constraint.value, constraint)
        return Form(LLMatcher.grammar_from_regex(constraint.value), constraint.value)
    if constraint.kind == "grammar":
        return Form(LLMatcher.grammar_from_lark(_lark(constraint)), constraint.value)
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(constraint.value), overrides=JSON_STYLE)
    return Form(grammar, constraint.value)


def _lark(constraint: Constraint) -> str:
    """Return a grammar in Lark's notation; llama.cpp's (GBNF, its rules written with `::=`) is translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(constraint.value))
    except Exception as error:  # its parser raises what it meets
        raise refused(
            constraint, f"is no grammar in Lark's or llama.cpp's notation: {one_line(error)}"
        ) from None


def check_pattern(pattern: str, constraint: Constraint, path: str = "") -> None:
    """Raise RequestError for a regular expression that is too long or repeats too often."""
    if len(pattern) > limits.MAX_PATTERN_CHARACTERS:
        most = limits.MAX_PATTERN_CHARACTERS
        raise refused(constraint, f"a pattern of {len(pattern)} characters, at most {most}", path)
    for found in REPETITION.finditer(pattern):
        if any(count and (len(count) > 9 or int(count) > limits.MAX_COUNT) for count in found.groups()):
            raise refused(constraint, f"repeats {found[0][:40]}, at most {limits.MAX_COUNT} times", path)


def matcher(form: Form, tokens: "LLTokenizer", constraint: Constraint) -> "LLMatcher":
    """Return what follows `form` for a vocabulary; RequestError where it is wrong or beyond the limits."""
    from llguidance import LLMatcher, LLParserLimits

    parser_limits = LLParserLimits(verbose_errors=False, **limits.PARSER_LIMITS)  # type: ignore[arg-type]
    made = LLMatcher(tokens, form.grammar, log_level=0, limits=parser_limits)
    _check(made, constraint)
    return made


def mask(made: "LLMatcher", constraint: Constraint) -> bytes:
    """Return the first mask, a bit a token; RequestError where it is beyond the limits."""
    bits = made.compute_bitmask()
    _check(made, constraint)
    return bits


def _check(made: "LLMatcher", constraint: Constraint) -> None:
    if made.is_error():
        raise refused(constraint, said(made.get_error()))


def said(error: str) -> str:
    """Return what llguidance says, and its limits where one was reached."""
    text = one_line(error.replace("<non-verbose/>", ""))
    if any(word in text.lower() for word in EXHAUSTED):
        names = ", ".join(f"{name} {value}" for name, value in limits.PARSER_LIMITS.items())
        return f"too complex: {text} (limits: {names})"
    return text
