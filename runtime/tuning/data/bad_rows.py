"""Rows that cannot be used, in whatever phase that shows: the first ends the job, or they are left out.

One `BadRows` goes with a data set through reading, normalising, rendering and encoding. Knows rows by
where they come from, not files, columns or templates. Start at `BadRows.attempt`.
"""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from runtime.errors import DataError
from runtime.tuning.data.limits import DataLimitError

log = logging.getLogger(__name__)

SHOWN = 3
"""Bad rows that are named one by one: enough to find what is wrong with the others."""

_ADVICE = "--on-bad-row skip leaves such rows out"
"""Where other rows were good: else the rows are of a shape that is not known."""
_MOST_REASONS = 5
_NUMBER = re.compile(r"\d+")


class BadRows:
    """Raises the error of a bad row under "fail"; under "skip" counts it and keeps the first few."""

    def __init__(self, policy: Literal["fail", "skip"] = "fail") -> None:
        self._policy = policy
        self.rows = 0
        """All rows that were read, bad ones included; the reader of a data set counts them here."""
        self.first: list[str] = []
        """The first bad rows: file, row, column and what is wrong."""
        self._where: set[str] = set()
        self._reasons: Counter[str] = Counter()
        self._wordings: dict[str, str] = {}
        self._said = 0
        self._good = False

    @property
    def skips(self) -> bool:
        """Whether bad rows are left out, rather than ending the job."""
        return self._policy == "skip"

    @property
    def skipped(self) -> int:
        return len(self._where)

    def __contains__(self, where: object) -> bool:
        return where in self._where

    @contextlib.contextmanager
    def attempt(self, where: str) -> Iterator[None]:
        """Do something with the row at `where` (`Example.origin`): its DataError is added.

        That too much was read ends the job, under any policy.
        """
        try:
            yield
            self._good = True
        except DataLimitError:
            raise
        except DataError as error:
            self.add(error, where)

    def add(self, error: DataError, where: str) -> None:
        """Count the row at `where` as skipped because of `error`; raise it, naming the row, under "fail"."""
        text = str(error)
        reason = text.removeprefix(where).lstrip(": ")
        located = text if text.startswith(where) else f"{where}: {text}"
        if self._policy == "fail":
            raise DataError(f"{located} ({_ADVICE})" if self._good else located) from error
        self._where.add(where)
        if len(self.first) < SHOWN:
            self.first.append(located)
        kind = _NUMBER.sub("#", reason)  # message 2 and message 3 have one reason
        self._wordings.setdefault(kind, reason)
        self._reasons[kind] += 1

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were skipped for each reason, most first; in the words of the first such row."""
        return {self._wordings[kind]: count for kind, count in self._reasons.most_common()}

    def conclude(self, phase: str) -> None:
        """Say in the log what `phase` has skipped; DataError where more than half of all rows are skipped."""
        if self.skipped == self._said:
            return
        self._said = self.skipped
        counts = [f"{count} × {reason}" for reason, count in self.reasons.items()]
        if len(counts) > _MOST_REASONS:
            counts[_MOST_REASONS:] = [f"{len(counts) - _MOST_REASONS} other reasons"]
        summary = f"{self.skipped} of {self.rows} rows cannot be used ({'; '.join(counts)})"
        first = "; ".join(self.first)
        if self.skipped * 2 > self.rows:
            raise DataError(f"{summary}: more than half, so something else is wrong; the first: {first}")
        log.warning("%s: %s and are skipped; the first: %s", phase, summary, first)
