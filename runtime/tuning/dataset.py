"""Data files of any common shape become examples: a list of messages, or plain text.

Every file below the folder is used, in the order of its path. Knows column names and formats, does not
know tokens or templates. Start at `load`; `normalise` decides what a row is.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.settings import DataSource

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
"""Format by file suffix."""

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

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: a conversation, or plain text when `messages` is empty."""

    messages: tuple[Message, ...]
    """Turns with keys role and content, the last one the assistant's."""
    text: str = ""
    """Text to learn whole, for rows that are no conversation."""
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


def load(source: DataSource, files: Sequence[Path] | None = None) -> Dataset:
    """Read `files`, or every data file of `source`; DataError naming file, row and column at fault."""
    examples: list[Example] = []
    used: list[DataFile] = []
    skipped = 0
    for path in files or find(source):
        count = 0
        for number, row in enumerate(read(path, source.extension), start=1):
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
        used.append(DataFile(path.name, count, _sha256(path)))
    if not examples:
        raise DataError(f"{source.folder}: none of {skipped} rows can be used; --on-bad-row fail says why")
    return Dataset(tuple(examples), tuple(used), skipped)


def find(source: DataSource) -> list[Path]:
    """Return the data files of `source` in path order; DataError telling what is there when none is."""
    if source.file is not None:
        if not source.file.is_file():
            raise DataError(f"{source.file}: no such data file")
        return [source.file]
    if not source.folder.is_dir():
        raise DataError(f"{source.folder}: no such directory, expected one with data files")
    present = sorted(
        path for path in source.folder.rglob("*") if path.is_file() and not _hidden(path, source.folder)
    )
    found = [path for path in present if source.extension or file_format(path)]
    if not found:
        names = ", ".join(path.name for path in present[:5]) or "nothing"
        raise DataError(
            f"{source.folder}: no data file (found {names}); expected parquet, json, jsonl, csv or arrow"
        )
    return found


def file_format(path: Path) -> str | None:
    """Return the format that the name of `path` tells, or None.

    A name may go on after the suffix (`train.parquet_download_true`): downloaders before KAITO 0.7
    kept the URL's query in it.
    """
    name = path.name.lower()
    exact = SUFFIXES.get(path.suffix.lower())
    if exact:
        return exact
    places = {name.rfind(suffix): kind for suffix, kind in SUFFIXES.items() if suffix in name}
    return places[max(places)] if places else None


def read(path: Path, extension: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file as mappings; DataError when it is not what its name says."""
    kind = extension or file_format(path)
    try:
        if kind == "parquet":
            yield from _read_parquet(path)
        elif kind == "arrow":
            yield from _read_arrow(path)
        elif kind == "csv":
            yield from _read_csv(path)
        else:
            yield from _read_json(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        start = path.read_bytes()[:40] if path.is_file() else b""
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: not a readable {kind} file ({reason}); it starts with {start!r}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    with pa.OSFile(str(path), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            yield from pa.ipc.open_file(stream).read_all().to_pylist()
        else:
            yield from pa.ipc.open_stream(stream).read_all().to_pylist()


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(
                    f"{path.name}: row {number} does not have {len(reader.fieldnames or ())} columns"
                )
            yield row


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSON list, an object with one list in it, or one object a line, whatever the suffix says."""
    with path.open(encoding="utf-8-sig") as stream:
        first = stream.read(1)
        while first and first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            rows = _parse(stream.read(), path.name)
        elif first == "{":
            rows = _json_objects(stream, path.name)
        else:
            start = stream.read(40)
            raise DataError(f"{path}: not a JSON file; it starts with {start!r}")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{path.name}: row {number} is {describe(row)}, expected an object")
            yield row


def _json_objects(lines: Iterator[str], name: str) -> Iterator[Any]:
    """Yield one object a line, or the rows of a single object spread over lines that holds a list."""
    number = 0
    for line in lines:
        number += 1
        if not line.strip():
            continue
        try:
            first = json.loads(line)
        except json.JSONDecodeError:
            if number > 1:
                raise DataError(f"{name}: row {number} is not valid JSON") from None
            whole = _parse(line + "".join(lines), name)
            lists = [value for value in whole.values() if isinstance(value, list)]
            yield from lists[0] if len(lists) == 1 else [whole]
            return
        yield first


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: not valid JSON: {error.msg} (line {error.lineno})") from None


def normalise(row: Mapping[str, Any], source: DataSource, where: str) -> Example:
    """Return `row` as an example, recognised by its columns; DataError naming row and column otherwise."""
    columns = {name.lower(): name for name in row}

    def column(*names: str) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    chosen = source.messages_column
    messages = chosen or column("messages", "conversations", "conversation")
    if source.response_column in row and (source.context_column or source.response_column != "text"):
        prompt = source.context_column or column("prompt", "instruction", "question", "input")
        return _pair(row, prompt, source.response_column, where=where)
    if messages and (chosen or not source.response_column or source.response_column not in row):
        return Example(_messages(_cell(row, messages, where), f"{where} column '{messages}'"), origin=where)
    for prompt, extra, answer in (
        ("instruction", ("input", "context"), ("output", "response")),
        ("prompt", (), ("completion", "response", "answer", "output")),
        ("question", ("context",), ("answer", "response", "output")),
        ("input", (), ("output", "response")),
    ):
        if column(prompt) and column(*answer):
            return _pair(row, column(prompt), column(*answer), where=where, context=column(*extra))
    text = source.response_column if source.response_column in row else column("text")
    if text:
        return Example((), text=_text(_cell(row, text, where), f"{where} column '{text}'"), origin=where)
    wanted = [
        name for name in (chosen, source.context_column, source.response_column) if name and name not in row
    ]
    missing = f"no column {' or '.join(map(repr, wanted))}" if wanted else "no known columns"
    raise DataError(
        f"{where}: {missing} (has {', '.join(row)}); expected messages, instruction/output, "
        "prompt/completion, question/answer or text, or messages_column, context_column and response_column"
    )


def _pair(
    row: Mapping[str, Any], prompt: str | None, answer: str | None, *, where: str, context: str | None = None
) -> Example:
    """Return a question and its answer; either may already be a list of messages."""
    if prompt is None or answer is None:
        raise DataError(f"{where}: no column with the prompt (has {', '.join(row)}); set context_column")
    asked, said = _cell(row, prompt, where), _cell(row, answer, where)
    if isinstance(asked, list) or isinstance(said, list):
        turns = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        turns = turns + (said if isinstance(said, list) else [{"role": "assistant", "content": said}])
        return Example(_messages(turns, f"{where} column '{answer}'"), origin=where)
    question = _text(asked, f"{where} column '{prompt}'")
    extra = row.get(context) if context else None
    if extra:
        question = f"{question}\n\n{_text(extra, f'{where} column {context!r}')}"
    reply = _text(said, f"{where} column '{answer}'")
    return Example(
        ({"role": "user", "content": question}, {"role": "assistant", "content": reply}), origin=where
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
        value = _parse(value, where)
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


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts) or path.suffix == ".part"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
