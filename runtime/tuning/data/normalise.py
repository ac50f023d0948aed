"""A row of any common shape becomes an example: a list of messages, or plain text.

Knows column names, does not know file formats, tokens or templates. Start at `normalise`, which decides what
a row is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.data import formats
from runtime.tuning.data.example import Example, Message
from runtime.tuning.settings import DataSource

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Roles by the names that data sets use for them (`from: human` is ShareGPT's)."""

PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("instruction", ("input", "context"), ("output", "response")),
    ("prompt", (), ("completion", "response", "answer", "output")),
    ("question", ("context",), ("answer", "response", "output")),
    ("input", (), ("output", "response")),
)
"""Columns of a question, of the context put under it, and of its answer, in the order they are looked for."""


def normalise(row: Mapping[str, Any], source: DataSource, where: str) -> Example:
    """Return `row` as an example, recognised by its columns; DataError naming row and column otherwise."""
    columns = {name.lower(): name for name in row}

    def column(*names: str) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    messages = source.messages_column or column("messages", "conversations", "conversation")
    prompt = source.context_column or column("prompt", "instruction", "question", "input")
    answer = source.response_column if source.response_column in row else None
    if source.messages_column is None and prompt and (answer or source.context_column):
        response = answer or column("completion", "response", "output", "answer")
        return _pair(row, prompt, response, where=where)
    if messages and (source.messages_column or not answer):
        return Example(_messages(_cell(row, messages, where), f"{where} column '{messages}'"), origin=where)
    for question, contexts, responses in PAIRS if not answer else ():
        if column(question) and column(*responses):
            return _pair(row, column(question), column(*responses), where=where, context=column(*contexts))
    text = answer or column("text")
    if text:
        return Example((), text=_text(_cell(row, text, where), f"{where} column '{text}'"), origin=where)
    wanted = [name for name in (source.context_column, source.response_column) if name and name not in row]
    missing = f"no column {' or '.join(map(repr, wanted))}" if wanted else "no known columns"
    raise DataError(
        f"{where}: {missing} (has {', '.join(row)}); expected messages, instruction/output, "
        "prompt/completion, question/answer or text, or messages_column, context_column and response_column"
    )


def _pair(
    row: Mapping[str, Any],
    prompt: str | None,
    response: str | None,
    *,
    where: str,
    context: str | None = None,
) -> Example:
    """Return a question and its answer; either may already be a list of messages."""
    if prompt is None or response is None:
        raise DataError(f"{where}: no column with the prompt (has {', '.join(row)}); set context_column")
    question, answer = _cell(row, prompt, where), _cell(row, response, where)
    if isinstance(question, list) or isinstance(answer, list):
        turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
        turns = turns + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])
        return Example(_messages(turns, f"{where} column '{response}'"), origin=where)
    question = _text(question, f"{where} column '{prompt}'")
    extra = row.get(context) if context else None
    if extra:
        question = f"{question}\n\n{_text(extra, f'{where} column {context!r}')}"
    answer = _text(answer, f"{where} column '{response}'")
    return Example(
        ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), origin=where
    )


def _cell(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: no column '{name}' (has {', '.join(row)})")
    value = row[name]
    if value is None:
        raise DataError(f"{where} column '{name}' is empty")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {describe(value)}, expected text")
    if not value.strip():
        raise DataError(f"{where} is empty text")
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """Return the turns with our role names; role/content or from/value, in any field order."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list that went through CSV
        value = formats.parse_json(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where} is {describe(value)}, expected a list of messages")
    turns: list[Message] = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise DataError(f"{where} message {number} is {describe(item)}, expected role and content")
        name, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        role = ROLES.get(str(name).lower())
        if role is None:
            raise DataError(f"{where} message {number} has role {name!r}, expected system, user or assistant")
        if not isinstance(content, str):
            raise DataError(f"{where} message {number} has content {describe(content)}, expected text")
        turns.append({"role": role, "content": content})
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise DataError(f"{where} has no assistant message, so there is nothing to learn")
    return tuple(turns)
