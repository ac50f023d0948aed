"""The progress bar of a run that is watched in a terminal; log lines stay whole above it.

Does not know training, only a `Throughput` to draw. Start at `TerminalBar.show`.
"""

import logging
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime.tuning.train.progress import Throughput

REFRESH_S = 0.1
"""Least time between two drawings."""


class TerminalBar:
    """A `Display` at the bottom of the terminal that `console` (standard error) writes to."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.clock = clock
        self.drawn = float("-inf")
        self.live: Live | None = None
        self._redirected: list[logging.StreamHandler] = []  # type: ignore[type-arg]

    def show(self, throughput: Throughput) -> None:
        """Draw the metrics, when the last drawing is `REFRESH_S` ago or this is the last step."""
        activity = throughput.activity
        done, total = (
            (activity.done, activity.total) if activity else (throughput.step, throughput.total_steps)
        )
        if self.clock() - self.drawn < REFRESH_S and done < total:
            return
        self.drawn = self.clock()
        self.live = self.live or self._open()
        self.live.update(_picture(throughput, done, total), refresh=True)

    def close(self) -> None:
        """Leave the last drawing on the screen, show the cursor, and restore the log handlers' stream."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        for handler in self._redirected:
            handler.setStream(sys.stderr)
        self._redirected.clear()

    def _open(self) -> Live:
        stream = sys.stderr
        live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
        live.start()  # from here on sys.stderr writes above the drawing
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(sys.stderr)
                self._redirected.append(handler)
        return live


def _picture(throughput: Throughput, done: int, total: int) -> Table:
    bar = ProgressBar(total=max(total, 1), completed=done)
    first_line = Table.grid(expand=True, padding=(0, 1))
    first_line.add_column(ratio=1)
    first_line.add_column(no_wrap=True)
    first_line.add_row(bar, Text(throughput.position_text()))
    lines = Table.grid(expand=True)
    lines.add_row(first_line)
    if throughput.step:
        lines.add_row(Text(throughput.metrics_text(), style="dim"))
    return lines
