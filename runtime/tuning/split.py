"""Which rows are trained on and which are held out to measure with. Start at `split`."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from runtime.errors import DataError
from runtime.tuning.settings import DataSource

Item = TypeVar("Item")

FROM_ROWS = 50
"""With fewer rows nothing is held out unless asked: each row is worth more in training."""

SHARE = 0.05
MOST_ROWS = 100
"""Held out when nobody says: one row in twenty, at least 5 and at most 100; enough to see over-fitting."""


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
    if rows < FROM_ROWS:
        return 0
    return min(MOST_ROWS, max(5, round(rows * SHARE)))
