"""Conversations as clients send them, and the turns that chat templates are given.

A history is never refused for what a model or another server once wrote into it: arguments that are no
JSON, ids that are missing, contents that are null, refusals and reasoning. Knows no tokenizer. Start at
`turns_of`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Tag, WithJsonSchema

from runtime.errors import RequestError
from runtime.serving.http import fields
from runtime.serving.http.body_types import Body, Name, Text, by_kind
from runtime.serving.http.json_parser import complete

MOST_MESSAGES = 16_384
MOST_PARTS = 8192
MOST_CALLS = 1024
LONGEST_ROLE = 40

ROLES = ("system", "developer", "user", "assistant", "tool")
_MEANT = {"human": "user", "ai": "assistant", "bot": "assistant", "model": "assistant", "gpt": "assistant"}
"""Other systems' names of roles."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_REASONING_PARTS = frozenset({"reasoning", "thinking", "reasoning_text", "summary_text"})
_SILENT_PARTS = frozenset({"redacted_thinking"})


class Part(Body):
    """One part of a message's content: text, a refusal, or reasoning."""

    treatments = fields.PART

    type: Name = "text"
    text: Text | None = None
    refusal: Text | None = None
    reasoning: Text | None = None
    thinking: Text | None = None


class FunctionCall(Body):
    """A function the model called, with its arguments: JSON text, or the object itself."""

    name: Name
    arguments: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})] = "{}"


class ToolCall(Body):
    """One tool call of an assistant's message."""

    treatments = fields.MESSAGE

    id: Name = ""
    type: Name = "function"
    function: FunctionCall


def _parts(value: Any) -> Any:
    """Return a list of parts with texts that stand for themselves as text parts."""
    if type(value) is not list or len(value) > MOST_PARTS:
        return value
    return [{"text": part} if type(part) is str else part for part in value]


Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        list[Part], Field(max_length=MOST_PARTS, fail_fast=True), BeforeValidator(_parts), Tag("<parts>")
    ],
    by_kind("a string or a list of parts", {str: "<text>", list: "<parts>"}),
]


class Message(Body):
    """One turn of a conversation."""

    treatments = fields.MESSAGE

    role: Name
    """system, developer, user, assistant, tool, or whatever the model's template names."""
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    function_call: FunctionCall | None = None
    """The older form of one tool call."""
    refusal: Text | None = None
    """The answer, where the model refused."""
    reasoning_content: Text | None = None
    """What the model thought before it answered; templates that know it show it."""
    reasoning: Text | None = None
    """Another name of `reasoning_content`."""


Messages = Annotated[list[Message], Field(max_length=MOST_MESSAGES, fail_fast=True)]


def turns_of(messages: Sequence[Message], template: str, *, param: str = "messages") -> list[dict[str, Any]]:
    """Return a conversation as chat templates know it: one text a turn, absent keys absent.

    `developer` is `system` where the template has no developer. The older function calls become tool calls.
    Raises RequestError, naming the message within `param`, for a role that is not known, for content that
    is not text, and for a turn of the system or the user without content.
    """
    called: dict[str, str] = {}  # the latest call in the older form, by its function
    turns = []
    for index, message in enumerate(messages):
        at = f"{param}[{index}]"
        role = _role(message.role, template, f"{at}.role")
        text, reasoning = _content(message, role, f"{at}.content")
        turn: dict[str, Any] = {"role": role, "content": text}
        if calls := list(_calls(message, f"call_{index}")):
            turn["tool_calls"] = calls
            called |= {call["function"]["name"]: call["id"] for call in calls if message.function_call}
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        elif message.role == "function":
            turn["tool_call_id"] = called.get(message.name or "", "")
        if message.name is not None:
            turn["name"] = message.name
        if reasoning:
            turn["reasoning_content"] = reasoning
        turns.append(turn)
    return turns


def _role(role: str, template: str, param: str) -> str:
    """Return the role that the template is given."""
    if role in {"system", "user", "assistant", "tool"} or _names(template, role):
        return role
    if role in {"developer", "function"}:
        return "system" if role == "developer" else "tool"
    if not template:
        return role
    meant = _MEANT.get(role.lower()) or fields.near_miss(role, ROLES)
    expected = f"did you mean '{meant}'?" if meant else f"expected one of {', '.join(ROLES)}"
    raise RequestError(
        f"'{param}' is '{role[:LONGEST_ROLE]}', which is no role here; {expected}", param=param
    )


def _names(template: str, role: str) -> bool:
    return f"'{role}'" in template or f'"{role}"' in template


def _content(message: Message, role: str, param: str) -> tuple[str, str]:
    """Return a message's text and its reasoning, "" where it has none."""
    texts: list[str] = []
    thoughts = [message.reasoning_content or message.reasoning or ""]
    content = message.content
    if isinstance(content, str):
        texts.append(content)
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if part.type in _TEXT_PARTS and part.text is not None:
            texts.append(part.text)
        elif part.type == "refusal":
            texts.append(part.refusal or part.text or "")
        elif part.type in _REASONING_PARTS:
            thoughts.append(part.reasoning or part.thinking or part.text or "")
        elif part.type not in _SILENT_PARTS:
            missing = (
                "has no 'text'" if part.type in _TEXT_PARTS else f"is of type '{part.type[:LONGEST_ROLE]}'"
            )
            raise RequestError(
                f"'{param}[{index}]' {missing}; parts of type 'text' with their 'text' are served here",
                param=f"{param}[{index}]",
            )
    if content is None:
        if role not in {"assistant", "tool"}:
            raise RequestError(f"'{param}' is missing: a message of role '{role}' needs it", param=param)
        texts.append(message.refusal or "")
    return "".join(texts), "".join(thoughts)


def _calls(message: Message, made_up: str) -> Iterator[dict[str, Any]]:
    """Yield a message's tool calls as templates know them, with an id where the older form has none."""
    if message.function_call is not None:
        yield _call(message.function_call, made_up, "function")
    for call in message.tool_calls or ():
        yield _call(call.function, call.id, call.type)


def _call(function: FunctionCall, call_id: str, kind: str) -> dict[str, Any]:
    called = {"name": function.name, "arguments": _arguments(function.arguments)}
    return {"id": call_id, "type": kind, "function": called}


def _arguments(sent: Any) -> Mapping[str, Any]:
    """Return a call's arguments as a mapping, which is what templates print or go through.

    Of an object that was cut, what is complete; of anything else, an object that holds it as `arguments`.
    """
    value = sent
    if isinstance(sent, str):
        try:
            value = complete(sent) if sent.strip() else {}
        except ValueError:
            value = sent
    return value if isinstance(value, dict) else {"arguments": value}
