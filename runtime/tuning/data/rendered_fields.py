"""Whether a model's chat template renders what the rows hold: nothing that a row says is lost without a word.

Each kind of field is tried once for each template, on the first row that has it: rendered as it is and with
a changed value, the texts must differ. Does not know labels or token ids. Start at `RenderedFields.fit`.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime import chat_template
from runtime.chat_template import TemplateOptions
from runtime.chat_template.thoughts import THOUGHT, find_thought, marked_contents
from runtime.errors import DataError, TemplateRefusedError
from runtime.logs import counted
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_MARK = "7291846035"
"""What a value is changed by: digits, which no template trims or changes the case of."""
_TRIES = 3
"""Rows on which a kind of field is tried when the template refuses them; their own rendering says why."""

Turns = list[Message]


@dataclass(frozen=True, slots=True)
class _Field:
    """A kind of field of rows, and how its value is changed."""

    name: str
    """As in "the chat template does not render {name}"."""
    change: Callable[[Message], None]
    """Changes the field in a message, or in a tool."""
    without: Callable[[Example, int], Example | None] = lambda _example, _index: None
    """Returns a row without the field in one message, None where it would make no sense without it."""


def _append(key: str) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        message[key] = f"{message[key]}{_MARK}"

    return change


def _change_call(place: int) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        function = message["tool_calls"][place]["function"]
        function["name"] += _MARK
        function["arguments"] = {_MARK: _MARK}

    return change


def _change_tool(tool: Message) -> None:
    tool["function"]["name"] += _MARK


def _changed(example: Example, index: int, message: Message) -> Example:
    messages = (*example.messages[:index], message, *example.messages[index + 1 :])
    return replace(example, messages=messages)


def _without(key: str) -> Callable[[Example, int], Example | None]:
    def without(example: Example, index: int) -> Example:
        kept = {name: value for name, value in example.messages[index].items() if name != key}
        return _changed(example, index, kept)

    return without


def _without_content(example: Example, index: int) -> Example:
    return _changed(example, index, {**example.messages[index], "content": ""})


def _without_tools(example: Example, _index: int) -> Example | None:
    called = any(message["role"] == "tool" or message.get("tool_calls") for message in example.messages)
    return None if called else replace(example, tools=())


TOOLS = _Field("tools", _change_tool, _without_tools)
CALLS = _Field("tool_calls", _change_call(0))
FURTHER_CALLS = _Field("tool_calls after the first of a message", _change_call(-1))
CONTENT_BESIDE_CALLS = _Field("the content beside tool_calls", _append("content"), _without_content)
REASONING = _Field("reasoning_content", _append("reasoning_content"), _without("reasoning_content"))
NAME = _Field("the name of messages", _append("name"), _without("name"))
RESULT = _Field("messages of the role tool", _append("content"))
SYSTEM = _Field("system messages", _append("content"))
LATER_SYSTEM = _Field("system messages after the first message", _append("content"))
QUESTION = _Field("messages of the role user", _append("content"))
ANSWER = _Field("messages of the role assistant", _append("content"))


def fields_of(example: Example) -> Iterator[tuple[_Field, int]]:
    """Yield every field that `example` has, with the index of its message (0 for tools).

    The ids of calls and the names of tools in their results tie messages together and say nothing else:
    many templates need neither.
    """
    if example.tools:
        yield TOOLS, 0
    for index, message in enumerate(example.messages):
        for field in _fields_of_message(message, first=index == 0):
            yield field, index


def _fields_of_message(message: Message, *, first: bool) -> Iterator[_Field]:
    role, calls = message["role"], message.get("tool_calls")
    if calls:
        yield CALLS
        if len(calls) > 1:
            yield FURTHER_CALLS
    if message.get("reasoning_content"):
        yield REASONING
    if message.get("name") and role != "tool":
        yield NAME
    if message["content"]:
        by_role = {"tool": RESULT, "user": QUESTION}
        by_role |= dict.fromkeys(("system", "developer"), SYSTEM if first else LATER_SYSTEM)
        yield by_role.get(role, CONTENT_BESIDE_CALLS if calls else ANSWER)


class RenderedFields:
    """What one model's chat template renders, as far as rows have asked."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, model: str, bad_rows: BadRows) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._bad_rows = bad_rows
        self._rendered: dict[tuple[str, bool], bool] = {}
        self._tries: Counter[tuple[str, bool]] = Counter()
        self._dropped: Counter[str] = Counter()

    def fit(self, examples: Iterable[Example]) -> list[Example]:
        """Return those of `examples` that the template renders whole, in the roles that it knows.

        A row with a field that it does not render is a bad row; where rows that are bad are skipped, one
        that makes sense without the field is kept without it, and counted in the log.
        """
        kept = []
        for example in examples:
            with self._bad_rows.attempt(example.origin):
                kept.append(self._fitted(example))
        for name, count in self._dropped.items():
            log.warning("%s: left out of %s", self._sentence(name), counted(count, "row"))
        self._dropped.clear()
        return kept

    def _fitted(self, example: Example) -> Example:
        if not example.messages or not self._tokenizer.chat_template:
            return example
        example = self._in_known_roles(example)
        dropped: dict[str, None] = {}  # in the order in which they are met
        for field, index in fields_of(example):
            if self._renders(example, field, index):
                continue
            without = field.without(example, index) if self._bad_rows.skips else None
            if without is None:
                raise DataError(
                    f"{self._sentence(field.name)}, which {_where(field, example, index)} has; "
                    "set chat_template in ModelConfig to one that does, or leave it out of the data"
                )
            example = without
            dropped[field.name] = None
        self._dropped.update(dropped.keys())
        self._require_whole_contents(example)
        return example

    def _require_whole_contents(self, example: Example) -> None:
        """Raise DataError where the template loses part of an answer's content that holds a thought.

        Checked in each row: what is lost depends on where in the content its tags are.
        """
        for index, message in enumerate(example.messages):
            content = message["content"]
            if message["role"] != "assistant" or not isinstance(content, str) or index in example.untrained:
                continue
            for part, marked in marked_contents(content, _MARK):
                turns, tools = list(example.messages[:index]), list(example.tools)
                if part == THOUGHT and self._opens_thought(turns, tools):
                    continue  # it is trained behind the generation prompt
                try:
                    text = self._render([*turns, {**message, "content": marked}], tools)
                except TemplateRefusedError:
                    break  # the row's own rendering says what it refuses
                if _MARK not in text:
                    raise DataError(
                        f"{self._sentence(part)}, which message {index + 1} (assistant) has; "
                        "set chat_template in ModelConfig to one that does, or leave it out of the data"
                    )

    def _sentence(self, name: str) -> str:
        return f"the chat template of {self._model} does not render {name}"

    def _in_known_roles(self, example: Example) -> Example:
        """Return `example` with the role system for developer where the template has none, as in serving."""
        features = chat_template.features(self._tokenizer, with_tools=bool(example.tools))
        known = {role: features.role(role) for role in example.roles()}
        if all(role == shown for role, shown in known.items()):
            return example
        messages = tuple({**message, "role": known[message["role"]]} for message in example.messages)
        return replace(example, messages=messages)

    def _renders(self, example: Example, field: _Field, index: int) -> bool:
        """Return whether the template renders a field, from the first rows that have it."""
        key = (field.name, bool(example.tools))
        if key not in self._rendered and self._tries[key] < _TRIES:
            self._tries[key] += 1
            try:
                self._rendered[key] = self._differs(example, field, index)
            except TemplateRefusedError:
                return True  # the row's own rendering says what it refuses
        return self._rendered.get(key, True)

    def _differs(self, example: Example, field: _Field, index: int) -> bool:
        """Return whether the text changes with the field; TemplateRefusedError when there is none."""
        turns, tools = _until_answer(example, index), list(example.tools)
        if field is REASONING and self._opens_thought(turns[:index], tools):
            return True  # it is trained behind the generation prompt, whatever earlier turns show of it
        changed, changed_tools = list(turns), tools
        if field is TOOLS:
            changed_tools = copy.deepcopy(tools)
            field.change(changed_tools[0])
        else:
            changed[index] = copy.deepcopy(turns[index])
            field.change(changed[index])
        if self._render(changed, changed_tools) != self._render(turns, tools):
            return True
        return index < len(turns) - 1 and self._prompt(turns[:-1], tools) != self._prompt(
            changed[:-1], changed_tools
        )

    def _prompt(self, turns: Turns, tools: list[dict[str, Any]]) -> str:
        """Return what is asked before an answer: some templates show more of a question there."""
        try:
            return chat_template.render(self._tokenizer, turns, TemplateOptions(tools=tools or None))
        except TemplateRefusedError:
            return ""

    def _opens_thought(self, turns: Turns, tools: list[dict[str, Any]]) -> bool:
        thought = find_thought(self._prompt(turns, tools))
        return thought is not None and not thought.closed

    def _render(self, turns: Turns, tools: list[dict[str, Any]]) -> str:
        return chat_template.render(
            self._tokenizer, turns, TemplateOptions(tools=tools or None, begins_answer=False)
        )


def _until_answer(example: Example, index: int) -> Turns:
    """Return the messages up to the first answer from `index` on: later ones may change how it is shown."""
    end = next(
        (at for at in range(index, len(example.messages)) if example.messages[at]["role"] == "assistant"),
        len(example.messages) - 1,
    )
    return list(example.messages[: end + 1])


def _where(field: _Field, example: Example, index: int) -> str:
    return "the row" if field is TOOLS else f"message {index + 1} ({example.messages[index]['role']})"
