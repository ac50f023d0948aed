"""What agents' histories hold, in the forms in which models, tools and other servers write it.

Each function takes any JSON value, before validation, and returns the form that messages.py describes, or the
value itself where it has no meaning, for validation to refuse. Knows no message. Start at `said`.
"""

import json
from collections.abc import Callable
from typing import Any

DEEPEST = 8
"""Lists and objects around a text, which is looked for no deeper."""

_TEXTS = ("text", "thinking", "reasoning", "reasoning_content", "refusal", "summary", "content", "value")
"""Names under which an object holds its text, the first that is there."""
_SAYING = frozenset({str, list, dict})
_CALL = frozenset({"function", "custom", "name", "arguments", "args", "input"})


def written(value: Any) -> str:
    """Return a value as JSON text, as models are shown results."""
    return json.dumps(value, ensure_ascii=False)


def said(sent: Any, depth: int = 0) -> Any:
    """Return the text that a value holds: a list's are joined, an object's has one of its usual names."""
    if type(sent) is str:
        return sent
    if type(sent) in (int, float):
        return written(sent)
    if depth < DEEPEST and type(sent) is list:  # of millions of numbers, perhaps
        return "".join(
            item if type(item) is str else said(item, depth + 1) or ""
            for item in sent
            if type(item) in _SAYING
        )
    if depth < DEEPEST and type(sent) is dict:
        return next((said(sent[name], depth + 1) for name in _TEXTS if sent.get(name)), None)
    return None  # false, true, null


def filled(value: Any, name: str) -> Any:
    """Return an object with "" for the text `name` where that is null; anything else as it is."""
    return value | {name: ""} if type(value) is dict and value.get(name, "") is None else value


def label(sent: Any) -> Any:
    """Return an id or a name: a number is its text, what is empty is absent."""
    if type(sent) in (int, float):
        return written(sent)
    return sent or None


def calls(most: int) -> Callable[[Any], Any]:
    """Return what makes a list of at most `most` tool calls of what stands for one."""

    def listed(sent: Any) -> Any:
        if type(sent) is dict and sent:
            sent = [sent]
        if type(sent) is not list or len(sent) > most:
            return sent or None
        return [_call(call) for call in sent if call]

    return listed


def _call(sent: Any) -> Any:
    """Return a tool call with its `function`, whichever name that has, or whose fields it has itself."""
    if type(sent) is not dict or type(sent.get("function")) is dict:
        return sent
    custom, function = sent.get("custom"), sent.get("function")
    if type(custom) is dict:
        called = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
    else:
        given = (sent[name] for name in ("arguments", "args", "input") if sent.get(name) is not None)
        called = {"name": function or sent.get("name"), "arguments": next(given, None)}
    return {name: value for name, value in sent.items() if name not in _CALL} | {"function": called}


def older_call(sent: Any) -> Any:
    """Return a call in the older form, None for one of nothing."""
    return None if not sent or (type(sent) is dict and not any(sent.values())) else sent
