"""The data of a job as it is trained on: encoded rows, and what was read and said while they were made.

It is kept as a folder of two files: rows.arrow, which any number of processes map into memory, and
facts.json, which names the digest of the other. Does not know which data a folder is of (row_cache.py), or
how rows are encoded. Start at `EncodedData`, then `write` and `read`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.config import Strict
from runtime.errors import DataError
from runtime.files import sha256
from runtime.logs import LogLine
from runtime.tuning.data.columns import Columns
from runtime.tuning.data.dataset import DataFile, DataSummary
from runtime.tuning.data.example import Example
from runtime.tuning.data.normalise import RowFacts
from runtime.tuning.data.tokenize import (
    EncodedExample,
    TokenizedData,
    TokenizedSequence,
    TokenizedSplit,
    collected,
)

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, FACTS = "rows.arrow", "facts.json"
"""The files of a folder."""
_BATCH_ROWS = 2000
"""Rows that are held in memory until they are written together."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row of a job's data, and what it has become."""

    origin: str
    """File and row."""
    held_out: bool
    encoded: EncodedExample


@dataclass(frozen=True, slots=True)
class EncodingFacts:
    """What a job needs to know of its data beside the encoded rows."""

    key: str
    """Which data in which encoding this is (row_cache.py)."""
    summary: DataSummary
    max_tokens: int
    train_rows: int
    """Before any was dropped because of its length."""
    held_out_rows: int
    questions: tuple[Example, ...]
    """To ask the model before and after training."""
    said: tuple[LogLine, ...]
    """What the log had while the rows were made."""


@dataclass(frozen=True, slots=True)
class EncodedData:
    """All rows of a job that were not bad, those to train on first."""

    rows: tuple[EncodedRow, ...]
    facts: EncodingFacts

    def tokenized(self) -> TokenizedSplit:
        """Return the sequences to train on and those held out."""
        train, held_out = parts(self.rows)
        return TokenizedSplit(train, held_out if held_out.rows else None)


def parts(rows: Sequence[EncodedRow]) -> tuple[TokenizedData, TokenizedData]:
    """Return the rows to train on, and those held out."""
    train, held_out = (
        collected(row.encoded for row in rows if row.held_out is part) for part in (False, True)
    )
    return train, held_out


class _Stored(Strict):
    """The content of facts.json: an `EncodingFacts`."""

    key: str
    rows_sha256: str
    rows: int
    files: tuple[DataFile, ...]
    columns: tuple[tuple[Columns, int], ...]
    unused: tuple[str, ...]
    ignored_fields: tuple[str, ...]
    notes: tuple[tuple[str, int], ...]
    skipped: int
    skipped_because: tuple[tuple[str, int], ...]
    max_tokens: int
    train_rows: int
    held_out_rows: int
    questions: tuple[Example, ...]
    said: tuple[LogLine, ...]

    @classmethod
    def of(cls, facts: EncodingFacts, rows_sha256: str) -> "_Stored":
        found, read = facts.summary, facts.summary.facts
        return cls(
            key=facts.key,
            rows_sha256=rows_sha256,
            rows=found.rows,
            files=found.files,
            columns=tuple(read.columns.items()),
            unused=read.unused,
            ignored_fields=read.ignored_fields,
            notes=tuple(read.notes.items()),
            skipped=found.skipped,
            skipped_because=tuple(found.skipped_because.items()),
            max_tokens=facts.max_tokens,
            train_rows=facts.train_rows,
            held_out_rows=facts.held_out_rows,
            questions=facts.questions,
            said=facts.said,
        )

    def facts(self) -> EncodingFacts:
        read = RowFacts(dict(self.columns), self.unused, self.ignored_fields, dict(self.notes))
        summary = DataSummary(self.rows, self.files, read, self.skipped, dict(self.skipped_because))
        return EncodingFacts(
            self.key,
            summary,
            self.max_tokens,
            self.train_rows,
            self.held_out_rows,
            self.questions,
            self.said,
        )


def write_rows(folder: Path, rows: Iterable[EncodedRow]) -> None:
    """Write `rows` as they come; only their owner may read them."""
    import pyarrow as pa

    with os.fdopen(_new(folder / ROWS), "wb") as stream, pa.ipc.new_file(stream, _schema()) as file:
        for batch in _batches(iter(rows)):
            file.write_batch(_as_arrow(batch))


def write_facts(folder: Path, facts: EncodingFacts) -> None:
    """Write what belongs to the rows, which are complete in `folder`."""
    stored = _Stored.of(facts, sha256(folder / ROWS))
    text = _utf8(json.dumps(stored.model_dump(), default=_as_json, ensure_ascii=False))
    with os.fdopen(_new(folder / FACTS), "wb") as stream:
        stream.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def read_facts(folder: Path) -> EncodingFacts:
    """Return what is known of the rows in `folder`; DataError where its files are damaged or not there."""
    return _stored(folder).facts()


def read(folder: Path, *, verified: bool = False) -> EncodedData:
    """Return the data in `folder`, its token ids mapped rather than read.

    DataError where its files are damaged or not there. The rows are compared with their digest, unless
    another process has `verified` them.
    """
    stored = _stored(folder)
    try:
        if not verified and sha256(folder / ROWS) != stored.rows_sha256:
            raise ValueError(f"{ROWS} is not what was written")
        rows = read_rows(folder)
    except Exception as error:  # pyarrow raises anything for a file that is none
        raise DataError(f"{folder}: {error}") from None
    return EncodedData(rows, stored.facts())


def _stored(folder: Path) -> _Stored:
    try:
        digest, _, text = (folder / FACTS).read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError(f"{FACTS} is not what was written")
        return _Stored.model_validate_json(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {error}") from None


def _new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _utf8(text: str) -> bytes:
    """Return `text` to be stored: names of files and of columns may hold what is no character."""
    return text.encode("utf-8", "replace")


def _as_json(value: Any) -> Any:
    """Return what JSON has in the place of `value`: the arguments of a call may be dates, say."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _batches(rows: Iterator[EncodedRow]) -> Iterator[list[EncodedRow]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        {
            "origin": pa.string(),
            "held_out": pa.bool_(),
            "outcome": pa.string(),
            "full_tokens": pa.int64(),
            "lengths": pa.large_list(pa.int32()),  # of the row's sequences
            "ids": pa.large_list(pa.int32()),  # of all of them
            "labelled": pa.large_list(pa.uint8()),
        }
    )


def _as_arrow(rows: list[EncodedRow]) -> "pa.RecordBatch":
    import pyarrow as pa

    def lists(values: list[Any], counts: Iterable[int]) -> "pa.LargeListArray":
        return pa.LargeListArray.from_arrays(np.cumsum([0, *counts]), np.concatenate(values))

    sequences = [sequence for row in rows for sequence in row.encoded.sequences]
    lengths = np.asarray([len(sequence) for sequence in sequences], dtype=np.int32)
    tokens = [row.encoded.tokens for row in rows]
    ids = [np.zeros(0, dtype=np.int32), *(sequence.ids for sequence in sequences)]
    labelled = [np.zeros(0, dtype=np.uint8), *(sequence.loss_mask.view(np.uint8) for sequence in sequences)]
    columns = [
        pa.array([_utf8(row.origin).decode() for row in rows]),
        pa.array([row.held_out for row in rows]),
        pa.array([row.encoded.outcome for row in rows]),
        pa.array([row.encoded.full_tokens for row in rows]),
        lists([lengths], (len(row.encoded.sequences) for row in rows)),
        lists(ids, tokens),
        lists(labelled, tokens),
    ]
    return pa.record_batch(columns, schema=_schema())


def read_rows(folder: Path) -> tuple[EncodedRow, ...]:
    """Return the rows that were written to `folder`, as views of the mapped file."""
    import pyarrow as pa

    file = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
    if file.schema != _schema():
        raise ValueError(f"{ROWS} has other columns")
    batches = map(file.get_batch, range(file.num_record_batches))
    return tuple(row for batch in batches for row in _of_batch(batch))


def _of_batch(batch: "pa.RecordBatch") -> Iterator[EncodedRow]:
    ids, labelled = (batch[name].values.to_numpy() for name in ("ids", "labelled"))
    mask, start = labelled.view(np.bool_), 0
    plain = (batch[name].to_pylist() for name in ("origin", "held_out", "outcome", "full_tokens", "lengths"))
    for origin, held_out, outcome, full_tokens, lengths in zip(*plain, strict=True):
        sequences = []
        for length in lengths:
            part, start = slice(start, start + length), start + length
            sequences.append(TokenizedSequence(ids[part], mask[part]))
        yield EncodedRow(origin, held_out, EncodedExample(outcome, full_tokens, tuple(sequences)))
