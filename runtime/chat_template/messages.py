"""Messages as one template takes them: arguments and ids of calls, results, thoughts.

Knows what a template renders (features.py), not how. Start at `prepared`.
"""

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from runtime.chat_template.features import NINE, TemplateFeatures, Turn

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Under which messages have a thought, and templates look for it."""
_LETTERS = string.ascii_letters + string.digits


def call_arguments(value: Any) -> Mapping[str, Any]:
    """Return the arguments of a call as templates get them: an object, which holds what is none."""
    return value if isinstance(value, Mapping) else {"arguments": value}


def prepared(turns: Sequence[Turn], features: TemplateFeatures) -> list[Turn]:
    """Return a conversation in new messages without what is None, as the template takes them.

    A thought is under each of its usual names; arguments of calls are text, ids nine characters and
    results in another role where the template wants that.
    """
    given = [_message(turn, features) for turn in turns]
    if features.call_ids == "nine":
        _renumber(given)
    return given


def _message(turn: Turn, features: TemplateFeatures) -> Turn:
    """Return one message; templates handle a missing key better than None."""
    message = {key: value for key, value in turn.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    if message.get("role") == "tool":
        message["role"] = features.result_role
    if message.get("tool_calls") and features.text_arguments:
        message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str | None):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _renumber(turns: list[Turn]) -> None:
    """Give calls and their results ids of nine letters and digits: the same for the same id, in any turn.

    A result without an id is that of the first call before it that has none yet.
    """
    waiting: list[str] = []
    for index, turn in enumerate(turns):
        if turn.get("tool_calls"):
            turn["tool_calls"] = [*_renumbered(turn["tool_calls"], index)]
            waiting = [call["id"] for call in turn["tool_calls"]]
        elif "tool_call_id" in turn or (waiting and turn.get("role") not in ("user", "assistant", "system")):
            sent = str(turn.get("tool_call_id") or "")
            own = _nine(sent) if sent else (waiting[0] if waiting else _nine(str(index)))
            if own in waiting:
                waiting.remove(own)
            turn["tool_call_id"] = own


def _renumbered(calls: list[dict[str, Any]], index: int) -> Iterator[dict[str, Any]]:
    for number, call in enumerate(calls):
        yield {**call, "id": _nine(str(call.get("id") or f"{index}.{number}"))}


def _nine(sent: str) -> str:
    """Return an id of nine letters and digits for `sent`, itself where it is one."""
    if NINE.fullmatch(sent):
        return sent
    number = int.from_bytes(sha256(sent.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return "".join(_LETTERS[number // 62**place % 62] for place in range(9))
