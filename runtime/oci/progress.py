"""Progress of a transfer: a bar on a terminal, a log line every few seconds elsewhere.

Called from several threads. Knows bytes, not images. Start at `Progress`.
"""

import logging
import sys
import threading
import time
from typing import Any, Self

from runtime.oci.store import TransferCancelledError

log = logging.getLogger(__name__)
_LOG_INTERVAL_S = 5.0


class Progress:
    """Counts the bytes of one transfer of `total` bytes."""

    def __init__(self, label: str, total: int):
        self._label, self._total = label, total
        self._bytes = 0
        self._cancelled = False
        self._started = self._logged_at = time.monotonic()
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
        """Count transferred bytes, negative for bytes to be sent again; raises after `cancel`."""
        if self._cancelled:
            raise TransferCancelledError(self._label)
        with self._lock:
            self._bytes += count
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._bytes)
                return
            now = time.monotonic()
            if now - self._logged_at < _LOG_INTERVAL_S:
                return
            self._logged_at = now
            transferred, seconds = self._bytes, now - self._started
        log.info(
            "%s: %s of %s, %s/s",
            self._label,
            size(transferred),
            size(self._total),
            size(int(transferred / seconds)),
        )

    def cancel(self) -> None:
        """Make the threads of this transfer end at their next chunk."""
        self._cancelled = True

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
