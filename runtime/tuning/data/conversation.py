"""A list of messages in any form that data has, as chat templates know messages.

Reads who speaks, what is said (content.py) and called (calls.py), and which turns are not trained on. Does
not know rows, columns or templates. Start at `read`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.data import calls, cells, literals
from runtime.tuning.data.calls import Call, Tool
from runtime.tuning.data.content import Content, content
from runtime.tuning.data.example import SPEAKERS, Message

CALLING = "calling"
"""The role of a message that is nothing but a tool call; it is part of an assistant's turn."""

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "ai", "model", "bot", "chatbot", "chatgpt", "bing", "bard"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), CALLING),
}
"""Roles by the names that data sets use for them (`from: human` is ShareGPT's), in lower case."""

_CONTENT = ("content", "value", "text", "parts")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TRAINED = ("weight", "train", "training", "trainable", "is_trainable", "loss", "loss_weight", "loss_mask")
_UNTRAINED = ("mask", "masked")
_TOOLS = ("tools", "functions")
_CALLS = ("tool_calls", "function_call")
_REFUSED = {
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text is trained on"),
    **dict.fromkeys(("train_detail", "training_detail"), "turns are trained on whole or not at all"),
}
"""Fields that ask for what is not done here, and why."""
_KNOWN = {*SPEAKERS, *_CONTENT, *_REASONING, *_TRAINED, *_UNTRAINED, *_TOOLS, *_CALLS, *_REFUSED}
_KNOWN |= {"name", "tool_call_id", "refusal"}
_THOUGHT_CHANNEL = "analysis"
_CHANNELS = (_THOUGHT_CHANNEL, "commentary", "final")
"""Values of `channel` in OpenAI's harmony format."""

_SPEAKER_LINES = re.compile(r"\n\n(Human|Assistant):")

_ASKED = ("user", "human", "prompt", "question", "query", "instruction", "input")
_ANSWERED = ("assistant", "gpt", "bot", "answer", "response", "completion", "output")
"""Fields of an item that is a question and its answer."""


@dataclass(slots=True)
class RowConversation:
    """The messages of one row."""

    messages: list[Message] = field(default_factory=list)
    untrained: set[int] = field(default_factory=set)
    """Indexes of assistant messages that the row says not to train on."""
    tools: tuple[Tool, ...] = ()
    """Those that a message itself holds."""
    ignored: set[str] = field(default_factory=set)
    """Names of the messages' fields that are not used."""
    notes: set[str] = field(default_factory=set)
    """What was done that the user should know."""

    @property
    def awaits_answer(self) -> bool:
        """Whether the last message is not the assistant's."""
        return not self.messages or self.messages[-1]["role"] != "assistant"

    def as_context(self) -> "RowConversation":
        """Return this conversation as what an answer follows: none of its own answers is trained on."""
        answers = {index for index, turn in enumerate(self.messages) if turn["role"] == "assistant"}
        said = {"answers within a prompt are context, and are not trained on"} if answers else set()
        return replace(self, untrained=self.untrained | answers, notes=self.notes | said)

    def answered_from(self, start: int) -> "RowConversation":
        """Return this conversation with its answers before message `start` as context."""
        head = replace(self, messages=self.messages[:start], untrained=set(), notes=set()).as_context()
        return replace(self, untrained=self.untrained | head.untrained, notes=self.notes | head.notes)

    def followed_by(self, later: "RowConversation") -> "RowConversation":
        """Return this conversation with the messages of `later` after its own."""
        shifted = {index + len(self.messages) for index in later.untrained}
        return RowConversation(
            self.messages + later.messages,
            self.untrained | shifted,
            self.tools + later.tools,
            self.ignored | later.ignored,
            self.notes | later.notes,
        )


def read(value: Any, where: str, *, answer: str = "") -> RowConversation:
    """Return the messages that `value` holds; DataError, beginning with `where`, when it holds none.

    A list of objects, of texts with JSON or of (key, value) pairs; an object of lists; or the text of one.
    `answer` names the column that answers the last of them, "" for none.
    """
    reader = _Reader()
    items = _items(value, where)
    if _are_texts(items):
        items = _alternating(items, where, answer)
        reader.conversation.notes.add("messages without a role were taken as question and answer in turn")
    for number, item in enumerate(items, start=1):
        reader.add(item, f"{where} message {number}")
    reader.end(where)
    return reader.conversation


def read_transcript(text: str) -> RowConversation | None:
    """Return the turns of a text in which "Human:" and "Assistant:" begin paragraphs, as hh-rlhf has them.

    None for another text.
    """
    _, *parts = _SPEAKER_LINES.split(f"\n\n{text.strip()}")
    turns = [(ROLES[name.lower()], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
    if not turns or turns[0][0] != "user" or not turns[-1][1]:
        return None
    return RowConversation([{"role": role, "content": said} for role, said in turns])


def read_history(value: Any, where: str) -> RowConversation:
    """Return earlier turns: messages, or a list of (question, answer) pairs; DataError for anything else."""
    reader = _Reader()
    for number, item in enumerate(_items(value, where), start=1):
        at = f"{where} item {number}"
        if isinstance(item, list | tuple) and len(item) == 2 and not isinstance(item[0], list | tuple):
            reader.add_pair(item[0], item[1], at)
        else:
            reader.add(item, at)
    reader.end(where)
    return reader.conversation


def is_history(value: Any) -> bool:
    """Return whether a cell is a list of turns, or the text of one: other things are named history too."""
    found = literals.parse_container(value)
    return isinstance(found, list) and bool(found)


def is_messages(value: Any) -> bool:
    """Return whether `value` is a list of messages or one message; a text never is, whatever it is of.

    An answer may be JSON text with a role in it that the model is to write.
    """
    first = value[0] if isinstance(value, list) and value and not _is_pairs(value) else value
    if _is_pairs(first):
        first = dict(first)
    if not isinstance(first, Mapping):
        return False
    keys = {str(key).lower() for key in first}
    return any(name in keys for name in SPEAKERS) and any(name in keys for name in (*_CONTENT, *_CALLS))


def is_text_of_messages(value: Any) -> bool:
    """Return whether `value` is a text, as CSV files have it, of a list of messages with known roles."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    found = literals.parse_container(value)
    return isinstance(found, list) and is_messages(found) and _has_known_role(found[0])


def _has_known_role(item: Any) -> bool:
    return isinstance(item, Mapping) and any(str(item.get(name)).lower() in ROLES for name in SPEAKERS)


def _items(value: Any, where: str) -> list[Any]:
    found = literals.parse_container(literals.parse_quoted(value))
    if isinstance(found, Mapping):
        lists = {key: item for key, item in found.items() if isinstance(item, list | tuple)}
        roles = any(str(key).lower() in SPEAKERS for key in lists)
        found = _transposed(lists, where) if roles else [found]
    if not isinstance(found, list) or not found:
        empty = "an empty list" if found == [] else describe(value)
        raise DataError(f"{where} is {empty}, expected a list of messages")
    return found


def _are_texts(items: list[Any]) -> bool:
    return all(isinstance(item, str) and not item.lstrip().startswith("{") for item in items)


def _alternating(texts: list[str], where: str, answer: str) -> list[dict[str, str]]:
    """Return texts in which two speak in turn, the second of them the assistant."""
    if answer and not len(texts) % 2:
        raise DataError(
            f"{where} is a list of {len(texts)} texts, of which the last would be the assistant's, with "
            f"another answer in '{answer}'; leave that out, or write objects with role and content"
        )
    if len(texts) % 2 and not answer:
        raise DataError(
            f"{where} is a list of {len(texts)} texts, expected objects with role and content, "
            "or a question and an answer in turn"
        )
    return [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(texts)]


def _transposed(lists: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return an object of lists, one for each field, as a list of objects."""
    lengths = {key: len(items) for key, items in lists.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{size} of {key}" for key, size in lengths.items())
        raise DataError(f"{where} holds lists of different lengths ({sizes}), expected one item a message")
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _is_pairs(item: Any) -> bool:
    """Return whether `item` is a map as Arrow gives it: a list of (key, value) tuples."""
    return isinstance(item, list) and bool(item) and all(isinstance(x, tuple) and len(x) == 2 for x in item)


def _fields(item: Any, where: str) -> dict[str, Any]:
    """Return what one message says, by lower-case names: what is null is absent."""
    item = literals.parse_container(item)
    if _is_pairs(item):
        item = dict(item)
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {describe(item)}, expected an object with role and content")
    fields: dict[str, Any] = {}
    for name, value in item.items():
        if cells.present(value):
            fields.setdefault(str(name).lower(), value)
    if not any(name in fields for name in SPEAKERS) and str(fields.get("type")).lower() in ROLES:
        return _langchain(fields)
    return fields


def _langchain(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a message as LangChain writes it: the role is its type, and the rest may lie in `data`."""
    data = fields.pop("data", None)
    inner = data if isinstance(data, Mapping) else {}
    return {**fields, **{k: v for k, v in inner.items() if cells.present(v)}, "role": fields.pop("type")}


class _Reader:
    """Builds one conversation, message by message."""

    def __init__(self) -> None:
        self.conversation = RowConversation()
        self._open = calls.OpenCalls()
        self._thought = ""
        """What the assistant thought in messages of its own, before the answer that is still to come."""
        self._made_up = 0

    def add(self, item: Any, where: str) -> None:
        """Add what `item` holds: a message, or a question and its answer."""
        fields = _fields(item, where)
        asked, answered = (next((n for n in names if n in fields), "") for names in (_ASKED, _ANSWERED))
        if asked and answered and not any(name in fields for name in SPEAKERS):
            if cells.filled(fields.get("system")):
                self.add({"role": "system", "content": fields["system"]}, where)
            return self.add_pair(fields[asked], fields[answered], where)
        self._check(fields, where)
        role = _role(fields, where)
        said = content(next((fields[name] for name in _CONTENT if name in fields), None), role, where)
        if role == "assistant" and fields.get("channel") == _THOUGHT_CHANNEL:
            return self._add_thought(said, fields, where)
        if role not in ("assistant", CALLING):
            self.end(where)
        if role == CALLING:
            return self._add_calls(calls.calls(said.text, where), fields, where)
        for result in said.results:
            self._add_turn({"role": "tool", **result})
        if said.results and not said.text:
            return None
        self._add_message(role, fields, said, where=where)
        return None

    def add_pair(self, question: Any, answer: Any, where: str) -> None:
        """Add a question and its answer."""
        self.end(where)
        self._add_turn({"role": "user", "content": cells.filled_text(question, f"{where} question")})
        self._add_turn({"role": "assistant", "content": cells.filled_text(answer, f"{where} answer")})

    def end(self, where: str) -> None:
        """Raise DataError where the assistant's thought has no answer after it."""
        if self._thought:
            raise DataError(f"{where}: a message of channel 'analysis' has no answer after it")

    def _add_thought(self, said: Content, fields: Mapping[str, Any], where: str) -> None:
        """Keep a message that is the thought of the answer after it."""
        if _trained(fields, where) is False or any(fields.get(key) for key in _CALLS) or said.calls:
            raise DataError(
                f"{where}, of channel 'analysis', is marked or calls, expected of the answer after it alone"
            )
        self._thought = "\n\n".join(filter(None, (self._thought, said.thoughts + said.text)))

    def _reasoning(self, thoughts: str = "") -> Message:
        """Return the field of an answer's thoughts: those that came before it, and its own."""
        thoughts = "\n\n".join(filter(None, (self._thought, thoughts)))
        self._thought = ""
        return {"reasoning_content": thoughts} if thoughts.strip() else {}

    def _check(self, fields: Mapping[str, Any], where: str) -> None:
        for name, reason in _REFUSED.items():
            if cells.filled(fields.get(name)) and fields[name] is not False:
                raise DataError(f"{where} has '{name}', which is not supported: {reason}")
        if str(fields.get("recipient")).startswith("functions."):
            raise DataError(f"{where} has a call in 'recipient', which is not supported: expected tool_calls")
        known = {"channel"} if fields.get("channel") in _CHANNELS else set()
        self.conversation.ignored |= fields.keys() - _KNOWN - known

    def _add_message(self, role: str, fields: Mapping[str, Any], said: Content, *, where: str) -> None:
        turn: Message = {"role": role, "content": said.text}
        if name := cells.number_or_text(fields.get("name")):
            turn["name"] = name
        if role == "assistant":
            self._add_answer(turn, fields, said, where=where)
            return
        if said.missing and role == "system":
            return
        if said.missing and role != "tool":
            raise DataError(f"{where} has no content ({', '.join(_CONTENT)})")
        if role == "tool" and (number := cells.number_or_text(fields.get("tool_call_id"))):
            turn["tool_call_id"] = number
        if _trained(fields, where) and role != "tool":
            self.conversation.notes.add(
                "a weight or mask of a message that is not the assistant's has no effect"
            )
        for tools in (fields[key] for key in _TOOLS if cells.filled(fields.get(key))):
            self.conversation.tools += calls.tools(tools, where)
        self._add_turn(turn)

    def _add_answer(self, turn: Message, fields: Mapping[str, Any], said: Content, *, where: str) -> None:
        thoughts = said.thoughts or next(
            (text for key in _REASONING if (text := thoughts_in(fields.get(key), f"{where} {key}"))), ""
        )
        if said.missing and isinstance(fields.get("refusal"), str):
            turn["content"] = fields["refusal"]
        turn |= self._reasoning(thoughts)
        called = [
            call for key in _CALLS if fields.get(key) for call in calls.calls(fields[key], f"{where} {key}")
        ]
        called += said.calls
        trained = _trained(fields, where) is not False
        if not called and trained and not turn["content"].strip():
            raise DataError(f"{where}, the assistant's, is empty: there is nothing to learn")
        if not trained:
            self.conversation.untrained.add(len(self.conversation.messages))
        self._add_turn(turn)
        if called:
            turn["tool_calls"] = self._identified(called)

    def _add_calls(self, found: list[Call], fields: Mapping[str, Any], where: str) -> None:
        """Add calls to the assistant's turn before them, or as a turn of their own."""
        if not found:
            raise DataError(f"{where} calls no function")
        messages = self.conversation.messages
        if not messages or messages[-1]["role"] != "assistant" or self._thought:
            if _trained(fields, where) is False:
                self.conversation.untrained.add(len(messages))
            self._add_turn({"role": "assistant", "content": ""} | self._reasoning())
        messages[-1].setdefault("tool_calls", []).extend(self._identified(found))

    def _identified(self, found: list[Call]) -> list[Call]:
        """Return calls with an id each; some templates require one of 9 letters and digits."""
        for call in found:
            if not call["id"]:
                call["id"] = f"call{self._made_up:05d}"
                self._made_up += 1
                self.conversation.notes.add("tool calls without an id were given one")
            self._open.open(call)
        return found

    def _add_turn(self, turn: Message) -> None:
        if turn["role"] == "tool":
            number = turn.get("tool_call_id") or self._open.first(turn.get("name"))
            if number is not None:
                turn["tool_call_id"] = number
                self._open.close(number)
        self.conversation.messages.append(turn)


def _role(fields: Mapping[str, Any], where: str) -> str:
    said = next((fields[name] for name in SPEAKERS if name in fields), None)
    role = ROLES.get(str(said).strip().lower().replace("-", "_").replace(" ", "_"))
    if role is None:
        raise DataError(f"{where} has role {describe(said)}, expected one of {', '.join(ROLES)}")
    return role


def thoughts_in(value: Any, where: str) -> str:
    """Return the text of reasoning: a text, or parts; "" for a switch or a number of that name."""
    if not isinstance(value, str | list | Mapping):
        return ""
    said = content(value, "assistant", where)
    return said.thoughts + said.text


def _trained(fields: Mapping[str, Any], where: str) -> bool | None:
    """Return what a message says of whether it is trained on; None where it says nothing."""
    for name in (*_TRAINED, *_UNTRAINED):
        if name in fields:
            flag = _FLAGS.get(str(fields[name]).strip().lower())
            if flag is None:
                raise DataError(
                    f"{where} has {name} {describe(fields[name])}, expected 0 or 1, true or false"
                )
            return flag != (name in _UNTRAINED)
    return None


_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
