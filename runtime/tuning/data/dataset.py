"""The data of a job: all rows of all files as examples, and which of them are held out.

Every file below the folder is used, in the order of its path. Does not know what a row may be
(`normalise.py`), tokens or templates. Start at `load`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np

from runtime.errors import DataError
from runtime.files import sha256
from runtime.logs import counted
from runtime.tuning.data import folder, formats
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.folder import FoundFile
from runtime.tuning.data.limits import ByteCount, DataLimitError, DataLimits, bounded_memory
from runtime.tuning.data.normalise import RowFacts, RowNormaliser
from runtime.tuning.data.splits import Split
from runtime.tuning.settings import DataSource

log = logging.getLogger(__name__)

HOLD_OUT_FROM_ROWS = 50
"""With fewer rows nothing is held out unless requested: each row is worth more in training."""

HELD_OUT_FRACTION = 0.05
MOST_HELD_OUT_ROWS = 100
"""Held out unless set: one row in twenty, at least 5 and at most 100; enough to see over-fitting."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file that was read, for the report and the provenance."""

    name: str
    """Its path below the data folder."""
    rows: int
    sha256: str
    format: str = ""
    split: Split = "train"


@dataclass(frozen=True, slots=True)
class Dataset:
    """All examples of a job, in file and row order."""

    examples: tuple[Example, ...]
    """Of all files but those of a validation set."""
    files: tuple[DataFile, ...]
    bad_rows: BadRows
    """Those left out so far (`on_bad_row: skip`); rendering and encoding add theirs."""
    validation: tuple[Example, ...] = ()
    """Of the files whose names say that they are to be held out."""
    facts: RowFacts = field(default_factory=RowFacts)
    """What the rows were made of."""

    def summary(self) -> "DataSummary":
        """Return what was read, and which rows could not be used so far."""
        return DataSummary(
            len(self.examples), self.files, self.facts, self.bad_rows.skipped, self.bad_rows.reasons
        )


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What was read, without the rows: for the report and the preview."""

    rows: int
    """Of all files but those of a validation set, without those that could not be read."""
    files: tuple[DataFile, ...]
    facts: RowFacts
    skipped: int
    """Rows that could not be used (`on_bad_row: skip`)."""
    skipped_because: Mapping[str, int]

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of all files, in order: equal exactly when the data is."""
        return tuple(_digest(file.split, file.sha256) for file in self.files)


def load(source: DataSource, files: Sequence[Path] | None = None) -> Dataset:
    """Read `files`, or every data file of `source`; DataError naming file, row and column at fault."""
    limit = DataLimits.of(source.max_bytes, source.folder).unpacked
    reader = _Reader(source, ByteCount(limit), BadRows(source.on_bad_row), RowNormaliser(source))
    found = _found(source, files)
    examples: dict[Split, list[Example]] = {"train": [], "validation": []}
    used: list[DataFile] = []
    for file in found:
        if file.split != "test":
            with bounded_memory(file.name, limit):
                read, data_file = reader.read(file, alone=bool(files) or len(found) == 1)
            examples[file.split] += read
            used.append(data_file)
    if not any(file.rows for file in used if file.split == "train"):
        where = found[0].path if len(found) == 1 else source.folder
        raise DataError(f"{where}: has no rows, expected at least one")
    _say_what_was_read(used, [file.name for file in found if file.split == "test"])
    _warn_of_copies(used)
    reader.bad_rows.conclude("reading")
    facts = reader.normaliser.facts()
    for note, count in facts.notes.items():
        log.warning("%d of %d rows: %s", count, sum(map(len, examples.values())), note)
    return Dataset(
        tuple(examples["train"]), tuple(used), reader.bad_rows, tuple(examples["validation"]), facts
    )


def digests_of(source: DataSource) -> tuple[str, ...]:
    """Return what `DataSummary.digests` will be, without reading a row; DataError where there is no data."""
    found = _found(source, None)
    return tuple(_digest(file.split, sha256(file.path)) for file in found if file.split != "test")


def names_and_digests(source: DataSource, files: Sequence[Path] | None = None) -> list[tuple[str, ...]]:
    """Return name, format, split and digest of each file that `load` would find, without reading a row."""
    return [
        (
            file.name,
            formats.kind_of(file.path, source.extension),
            file.split,
            "" if file.split == "test" else sha256(file.path),
        )
        for file in _found(source, files)
    ]


def _digest(split: Split, digest: str) -> str:
    return digest if split == "train" else f"{split}:{digest}"


def _found(source: DataSource, files: Sequence[Path] | None) -> list[FoundFile]:
    if files:
        return folder.listed(files)
    return folder.find(source.folder, file=source.file, extension=source.extension)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes examples of files, one after another."""

    source: DataSource
    unpacked: ByteCount
    bad_rows: BadRows
    normaliser: RowNormaliser

    def read(self, file: FoundFile, *, alone: bool) -> tuple[list[Example], DataFile]:
        """Return the examples of one file, and what the file was."""
        examples: list[Example] = []
        rows = 0
        try:
            for example in self._rows(file):
                rows += 1
                if example is not None:
                    examples.append(example)
        except DataLimitError:
            raise
        except DataError as error:
            if alone or examples:
                raise
            raise DataError(
                f"{error}; if {file.name} is no data, give the file that is with --data"
            ) from error
        self.bad_rows.rows += rows
        kind = formats.kind_of(file.path, self.source.extension)
        return examples, DataFile(file.name, rows, sha256(file.path), kind, file.split)

    def _rows(self, file: FoundFile) -> Iterator[Example | None]:
        """Yield the example of each row of a file, None for a bad row."""
        for number, row in enumerate(formats.read(file.path, self.source.extension, self.unpacked), start=1):
            where, example = f"{file.name}: row {number}", None
            with self.bad_rows.attempt(where):
                if isinstance(row, DataError):
                    raise DataError(f"{where} {row}")
                example = self.normaliser.example(row, where)
            yield example


def _say_what_was_read(files: Sequence[DataFile], test: Sequence[str]) -> None:
    """Log a line for each kind of file."""
    groups: dict[tuple[Split, str], list[DataFile]] = {}
    for file in files:
        groups.setdefault((file.split, file.format), []).append(file)
    for (split, kind), members in groups.items():
        purpose = "held out" if split == "validation" else "read"
        rows = counted(sum(file.rows for file in members), "row")
        names = _some([file.name for file in members])
        log.info("%s %s, of %s (%s)", rows, purpose, counted(len(members), f"{kind} file"), names)
    if test:
        log.info("%s left out, with rows to test on: %s", counted(len(test), "file"), _some(test))


def _warn_of_copies(files: Sequence[DataFile]) -> None:
    """Say which files perhaps hold the same rows: equal bytes, or one name in two formats."""
    copies: dict[str, list[DataFile]] = {}
    formats_of: dict[PurePath, dict[str, DataFile]] = {}
    for file in files:
        if file.rows:
            copies.setdefault(file.sha256, []).append(file)
            stem = PurePath(file.name).with_name(formats.base_name(PurePath(file.name)) or file.name)
            formats_of.setdefault(stem, {})[file.format] = file
    for same in (*copies.values(), *(list(found.values()) for found in formats_of.values())):
        if len(same) > 1:
            splits = {file.split for file in same}
            what = "count twice" if len(splits) == 1 else "are both trained on and held out"
            names = " and ".join(file.name for file in same[:3])
            log.warning("%s perhaps hold the same rows, which then %s", names, what)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}"


def divide(data: Dataset, source: DataSource) -> tuple[list[Example], list[Example]]:
    """Return (train, held out): the files of a validation set where there are any, else as `split` does."""
    if not data.validation:
        return split(data.examples, source)
    if source.train_share is not None:
        log.info("train_test_split does not count: the data has a validation set of its own")
    return list(data.examples), list(data.validation)


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
