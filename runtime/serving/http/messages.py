"""Conversations as clients send them, and the turns that chat templates are given.

A history is never refused for what a model, a tool or another server once wrote into it: what is empty in
any form is absent, and what is said in any form is read (history.py). Knows no tokenizer. Start at
`turns_of`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Tag, ValidationInfo, WithJsonSchema

from runtime.chat_template import TemplateFeatures, call_arguments
from runtime.errors import RequestError
from runtime.serving.http import fields, history
from runtime.serving.http.body_types import Body, Name, Text, by_kind
from runtime.serving.http.json_parser import complete, values

MOST_MESSAGES = 16_384
MOST_PARTS = 8192
MOST_CALLS = 1024
MOST_VALUES = 2**16
"""Values in the JSON texts of all calls' arguments of one conversation; what comes after them stays text."""
LONGEST_ROLE = 40

ROLES = ("system", "developer", "user", "assistant", "tool")
_MEANT = {"human": "user", "ai": "assistant", "bot": "assistant", "model": "assistant", "gpt": "assistant"}
"""Other systems' names of roles."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_REASONING_PARTS = frozenset({"reasoning", "thinking", "reasoning_text", "summary_text"})
_SILENT_PARTS = frozenset({"redacted_thinking"})
_OTHER_PARTS = frozenset(
    {"refusal", "image", "image_url", "input_image", "audio", "audio_url", "input_audio"}
    | {"video", "video_url", "file", "input_file"}
)
_PART_TYPES = _TEXT_PARTS | _REASONING_PARTS | _SILENT_PARTS | _OTHER_PARTS
_ASKING = frozenset({"system", "developer", "user"})
"""Roles whose contents people write."""

Said = Annotated[Text | None, BeforeValidator(history.said)]
Label = Annotated[Text | None, BeforeValidator(history.label)]


class Part(Body):
    """One part of a message's content: text, a refusal, or reasoning."""

    treatments = fields.PART

    type: Name = "text"
    text: Said = None
    refusal: Said = None
    reasoning: Said = None
    thinking: Said = None


class FunctionCall(Body):
    """A function the model called, with its arguments: JSON text, or the object itself."""

    name: Label = None
    arguments: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})] = "{}"


class ToolCall(Body):
    """One tool call of an assistant's message. Calls of other types than `function` are read as such."""

    treatments = fields.MESSAGE

    id: Label = None
    type: Label = None
    function: FunctionCall = FunctionCall()


def _parts(value: Any) -> Any:
    """Return a list of parts with texts that stand for themselves as text parts, those in a row as one."""
    if type(value) is not list or len(value) > MOST_PARTS:
        return value
    parts: list[Any] = []
    for bare, run in groupby(value, _is_bare):
        if bare:
            parts.append({"text": "".join(filter(None, run))})
        else:
            parts += [history.filled(part, "text") for part in run]
    return parts


def _is_bare(part: Any) -> bool:
    return part is None or type(part) is str


_PART_NAMES = frozenset({*Part.model_fields, *fields.PART})


def _is_part(value: Any) -> bool:
    """Return whether a value within a tool's result is a part rather than data."""
    if type(value) is not dict:
        return _is_bare(value)
    kind = value.get("type")
    if kind is None:
        return "text" in value and value.keys() <= _PART_NAMES
    return type(kind) is str and kind in _PART_TYPES


def _readable(sent: Any, info: ValidationInfo) -> Any:
    """Return content as a text or a list of parts: a part may stand alone, and results may be any JSON."""
    if type(sent) is str:
        return sent
    if type(sent) is dict and _is_part(sent):
        return [sent]
    role = info.data.get("role")
    if role in _ASKING:
        return sent
    if type(sent) is list and (role == "assistant" or all(map(_is_part, sent[: MOST_PARTS + 1]))):
        return sent
    return history.written(sent)


Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        list[Part], Field(max_length=MOST_PARTS, fail_fast=True), BeforeValidator(_parts), Tag("<parts>")
    ],
    by_kind("a string or a list of parts", {str: "<text>", list: "<parts>"}),
    BeforeValidator(_readable),
]


class Message(Body):
    """One turn of a conversation."""

    treatments = fields.MESSAGE

    role: Name
    """system, developer, user, assistant, tool, or whatever the model's template names."""
    content: Content | None = None
    name: Label = None
    tool_calls: Annotated[
        Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None,
        BeforeValidator(history.calls(MOST_CALLS)),
    ] = None
    tool_call_id: Label = None
    function_call: Annotated[FunctionCall | None, BeforeValidator(history.older_call)] = None
    """The older form of one tool call."""
    refusal: Said = None
    """The answer, where the model refused."""
    reasoning_content: Said = None
    """What the model thought before it answered; templates that know it show it."""
    reasoning: Said = None
    """Another name of `reasoning_content`."""


def with_contents(value: Any) -> Any:
    """Return a list of messages with "" for contents that are null; one that is missing is another thing."""
    if type(value) is not list or len(value) > MOST_MESSAGES:
        return value
    return [history.filled(message, "content") for message in value]


Messages = Annotated[
    list[Message], Field(max_length=MOST_MESSAGES, fail_fast=True), BeforeValidator(with_contents)
]


def turns_of(
    messages: Sequence[Message],
    features: TemplateFeatures,
    *,
    param: str = "messages",
    places: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return a conversation as chat templates know it: one text a turn, absent keys absent.

    `places` are the indices within `param` of the messages, where these are not 0, 1, 2….
    `developer` is `system` where the template has no developer. The older function calls become tool calls.
    Raises RequestError, naming the message within `param`, for a role that is not known, for content that
    is not text, and for a turn of the system or the user without content.
    """
    called: dict[str, str] = {}  # the latest call in the older form, by its function
    arguments = _Arguments()
    turns = []
    for index, message in enumerate(messages):
        at = f"{param}[{places[index] if places else index}]"
        role = _role(message.role, features, f"{at}.role")
        text, reasoning = content_of(message, role, f"{at}.content")
        turn: dict[str, Any] = {"role": role, "content": text}
        if calls := list(_calls(message, f"call_{index}", arguments)):
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


def _role(role: str, features: TemplateFeatures, param: str) -> str:
    """Return the role that the template is given."""
    known = features.role(role)
    if known in features.roles:
        return known
    meant = _MEANT.get(role.lower()) or fields.near_miss(role, ROLES)
    expected = f"did you mean '{meant}'?" if meant else f"expected one of {', '.join(ROLES)}"
    raise RequestError(
        f"'{param}' is '{role[:LONGEST_ROLE]}', which is no role here; {expected}", param=param
    )


def content_of(message: Message, role: str, param: str) -> tuple[str, str]:
    """Return a message's text and its reasoning, "" where it has none; RequestError for what is no text."""
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
    if content is None and role not in {"assistant", "tool"}:
        raise RequestError(f"'{param}' is missing: a message of role '{role}' needs it", param=param)
    return "".join(texts) or message.refusal or "", "".join(thoughts)


def _calls(message: Message, made_up: str, arguments: "_Arguments") -> Iterator[dict[str, Any]]:
    """Yield a message's tool calls as templates know them, with an id where the older form has none."""
    calls = [(call.id or "", call.function) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.insert(0, (made_up, message.function_call))
    for call_id, function in calls:
        called = {"name": function.name or "", "arguments": arguments.mapping(function.arguments)}
        yield {"id": call_id, "type": "function", "function": called}


def check_calls(calls: Sequence[ToolCall], at: str) -> None:
    """Raise RequestError where the turn that other routes' items at `at` make has too many calls."""
    if len(calls) > MOST_CALLS:
        raise RequestError(f"'{at}' begins a turn of {len(calls)} calls, at most {MOST_CALLS}", param=at)


class _Arguments:
    """The arguments of one conversation's calls, whose texts are read up to `MOST_VALUES` values."""

    def __init__(self) -> None:
        self._left = MOST_VALUES

    def mapping(self, sent: Any) -> Mapping[str, Any]:
        """Return a call's arguments as a mapping, which is what templates print or go through.

        Of an object that was cut, what is complete; of anything else, an object that holds it as `arguments`.
        """
        value = self._read(sent) if isinstance(sent, str) else sent
        return call_arguments(value)

    def _read(self, sent: str) -> Any:
        """Return the value of JSON text, or the text where it has none or there is no room for it."""
        if not sent.strip():
            return {}
        if (found := values(sent)) > self._left:
            return sent
        self._left -= found
        try:
            return complete(sent)
        except ValueError:
            return sent
