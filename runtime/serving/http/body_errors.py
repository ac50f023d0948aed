"""What is wrong with a body, in the user's words: the first error of a validation as one RequestError.

Knows pydantic's errors, and no field. Start at `refusal`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from runtime.errors import RequestError

SHOWN = 40
"""Characters of a wrong value that a message repeats."""

_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}
"""What a value must be, by pydantic's type of the error."""

_SENTENCES = {
    "missing": "is missing",
    "too_long": "has {actual_length} items, at most {max_length} are taken",
    "too_short": "needs at least {min_length} item(s)",
    "string_too_long": "is longer than {max_length} characters",
    "string_too_short": "needs at least {min_length} character(s)",
    "string_pattern_mismatch": "does not match {pattern}",
}
_WHOLE = frozenset({"near_miss", "refused"})
"""Errors of our own that name their field themselves."""


def refusal(error: ValidationError) -> RequestError:
    """Return the first error in a body as one line: where it is, what was expected, what was sent."""
    problem = error.errors(include_url=False)[0]
    kind, context = problem["type"], problem.get("ctx", {})
    path = _path(problem["loc"])
    if kind in _WHOLE:
        param = f"{path}.{context['field']}" if path else str(context["field"])
        return RequestError(
            problem["msg"].replace(f"'{context['field']}'", f"'{_short(param)}'", 1), param=param
        )
    what = f"'{path}'" if path else "the body"
    return RequestError(f"{what} {_sentence(problem, context)}", param=path or None)


def required(value: Any, param: str) -> Any:
    """Return a value that a field must have where others have theirs; RequestError where it is absent."""
    if value is None:
        raise RequestError(f"'{param}' {_SENTENCES['missing']}", param=param)
    return value


def _sentence(problem: ErrorDetails, context: Mapping[str, Any]) -> str:
    kind = problem["type"]
    if kind in _SENTENCES:
        return _SENTENCES[kind].format_map(context)
    if kind in _EXPECTED:
        limits = {name: _written(value) for name, value in context.items()}
        return f"must be {_EXPECTED[kind].format_map(limits)}, not {shown(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    return f"{message}, not {shown(problem['input'])}" if message.startswith("must be ") else message


def _written(limit: Any) -> Any:
    """Return a limit as a person writes it: 1 for 1.0, and every digit of an integer."""
    return f"{limit:.16g}" if isinstance(limit, float) else limit


def _path(location: tuple[int | str, ...]) -> str:
    """Return where an error is, as users write it: messages[1].content. Branches of unions have no name."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<") and step != "[key]":
            name = _short(step)
            path += f".{name}" if path else name
    return path


def _short(text: str) -> str:
    """Return a name that a client sent, with what does not belong in a line replaced."""
    return re.sub(r"[^\x20-\x7e]", "?", text[:120])


def shown(value: Any) -> str:
    """Return a wrong value as JSON, shortened; lists and objects by their kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= SHOWN else value[:SHOWN] + "…", ensure_ascii=False)
    written = json.dumps(value)
    return written if len(written) <= SHOWN else written[:SHOWN] + "…"
