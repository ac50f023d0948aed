"""The data of a job: all rows of all files as examples, and which of them are held out.

Every file below the folder is used, in the order of its path. Does not know what a row may be
(`normalise.py`), tokens or templates. Start at `load`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from runtime.errors import DataError
from runtime.files import sha256
from runtime.tuning.data import formats
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.normalise import RowFacts, RowNormaliser
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
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """All examples of a job, in file and row order."""

    examples: tuple[Example, ...]
    files: tuple[DataFile, ...]
    bad_rows: BadRows
    """Those left out so far (`on_bad_row: skip`); rendering and encoding add theirs."""
    facts: RowFacts = field(default_factory=RowFacts)
    """What the rows were made of."""

    @property
    def digest(self) -> str:
        """The digests of all files, in order: equal exactly when the data is."""
        return " ".join(file.sha256 for file in self.files)


def load(source: DataSource, files: Sequence[Path] | None = None) -> Dataset:
    """Read `files`, or every data file of `source`; DataError naming file, row and column at fault."""
    bad_rows = BadRows(source.on_bad_row)
    normaliser = RowNormaliser(source)
    examples: list[Example] = []
    used: list[DataFile] = []
    for path in files or formats.find(source.folder, file=source.file, extension=source.extension):
        count = 0
        for number, row in enumerate(formats.read(path, source.extension), start=1):
            where = f"{path.name}: row {number}"
            count = number
            with bad_rows.attempt(where):
                examples.append(normaliser.example(row, where))
        if not count:
            raise DataError(f"{path}: has no rows, expected at least one")
        bad_rows.rows += count
        used.append(DataFile(path.name, count, sha256(path)))
    bad_rows.conclude("reading")
    facts = normaliser.facts()
    for note, count in facts.notes.items():
        log.warning("%d of %d rows: %s", count, len(examples), note)
    return Dataset(tuple(examples), tuple(used), bad_rows, facts)


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
