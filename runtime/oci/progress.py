"""Progress of a transfer: a bar on a terminal, a log line every few seconds elsewhere.

Called from several threads. Knows bytes, not images. Start at `Progress`.
"""

import logging
import sys
import threading
import time
from typing import Any, Self

from runtime.oci.store import CalledOffError

log = logging.getLogger(__name__)
_EVERY_S = 5.0


class Progress:
    """Counts the bytes of one transfer of `total` bytes."""

    def __init__(self, label: str, total: int):
        self._label, self._total = label, total
        self._bytes = 0
        self._called_off = False
        self._started = self._spoke = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn(self._label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int) -> None:
        """Count bytes just moved; negative when some must be moved again. Raises after `call_off`."""
        if self._called_off:
            raise CalledOffError(self._label)
        with self._lock:
            self._bytes += count
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._bytes)
                return
            now = time.monotonic()
            if now - self._spoke < _EVERY_S:
                return
            self._spoke = now
            moved, seconds = self._bytes, now - self._started
        log.info(
            "%s: %s of %s, %s/s", self._label, size(moved), size(self._total), size(int(moved / seconds))
        )

    def call_off(self) -> None:
        """Make the threads of this transfer end at their next piece."""
        self._called_off = True

    def done(self, result: str) -> None:
        """Log the end of the transfer."""
        log.info(
            "%s: %s (%s in %.1f s)", self._label, result, size(self._total), time.monotonic() - self._started
        )


def size(count: int) -> str:
    """Return a byte count for people: `12.3 MB`."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
