"""Rows of any common shape become examples: a list of messages, or plain text.

Every file below the folder is used, in the order of its path. Knows column names, does not know file
formats, tokens or templates. Start at `load`; `normalise` decides what a row is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from runtime.config import describe
from runtime.errors import DataError
from runtime.files import sha256
from runtime.tuning.data import formats
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

HOLD_OUT_FROM_ROWS = 50
"""With fewer rows nothing is held out unless requested: each row is worth more in training."""

HELD_OUT_FRACTION = 0.05
MOST_HELD_OUT_ROWS = 100
"""Held out unless set: one row in twenty, at least 5 and at most 100; enough to see over-fitting."""

Item = TypeVar("Item")
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: a conversation, or plain text when `messages` is empty."""

    messages: tuple[Message, ...]
    """Turns with keys role and content, the last one the assistant's."""
    text: str = ""
    """Text of which every token is labelled, for rows that are no conversation."""
    origin: str = ""
    """File and row, for error messages."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file that was read, for the report and the provenance."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """All examples of a job, in file and row order."""

    examples: tuple[Example, ...]
    files: tuple[DataFile, ...]
    skipped: int
    """Rows left out because they could not be read (`on_bad_row: skip`)."""

    @property
    def digest(self) -> str:
        """The digests of all files, in order: equal exactly when the data is."""
        return " ".join(file.sha256 for file in self.files)


def load(source: DataSource, files: Sequence[Path] | None = None) -> Dataset:
    """Read `files`, or every data file of `source`; DataError naming file, row and column at fault."""
    examples: list[Example] = []
    used: list[DataFile] = []
    skipped = 0
    for path in files or formats.find(source.folder, file=source.file, extension=source.extension):
        count = 0
        for number, row in enumerate(formats.read(path, source.extension), start=1):
            where = f"{path.name}: row {number}"
            count = number
            try:
                examples.append(normalise(row, source, where))
            except DataError:
                if source.on_bad_row == "fail":
                    raise
                skipped += 1
        if not count:
            raise DataError(f"{path}: has no rows, expected at least one")
        used.append(DataFile(path.name, count, sha256(path)))
    if not examples:
        raise DataError(f"{source.folder}: none of {skipped} rows can be used; --on-bad-row fail says why")
    return Dataset(tuple(examples), tuple(used), skipped)


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


def split(rows: Sequence[Item], source: DataSource) -> tuple[list[Item], list[Item]]:
    """Return (train, held out), shuffled by `shuffle_seed`; without `shuffle` the last rows are held out."""
    count = held_out_rows(len(rows), source.train_share)
    if count >= len(rows):
        raise DataError(f"train_test_split {source.train_share} leaves none of {len(rows)} rows to train on")
    order = list(range(len(rows)))
    if source.shuffle:
        order = [int(row) for row in np.random.default_rng(source.shuffle_seed).permutation(len(rows))]
    cut = len(rows) - count
    return [rows[row] for row in order[:cut]], [rows[row] for row in order[cut:]]


def held_out_rows(rows: int, train_share: float | None) -> int:
    """Return how many of `rows` to hold out."""
    if train_share is not None:
        return round(rows * (1 - train_share))
    if rows < HOLD_OUT_FROM_ROWS:
        return 0
    return min(MOST_HELD_OUT_ROWS, max(5, round(rows * HELD_OUT_FRACTION)))
