"""Progress of training on a terminal: a bar, and the figures under it.

Log lines that come meanwhile scroll by above. Does not know the trainer. Start at `Bar`.
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

from runtime.tuning.progress import Meter

REFRESH_S = 0.1
"""Least time between two drawings."""


class Bar:
    """A `Display` at the bottom of the terminal that `console` (standard error) writes to."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.clock = clock
        self.drawn = float("-inf")
        self.live: Live | None = None
        self._moved: list[logging.StreamHandler] = []  # type: ignore[type-arg]

    def show(self, meter: Meter) -> None:
        """Draw the state of `meter`, when the last drawing is `REFRESH_S` ago or it is the last step."""
        if self.clock() - self.drawn < REFRESH_S and meter.step < meter.total_steps:
            return
        self.drawn = self.clock()
        self.live = self.live or self._open()
        self.live.update(_picture(meter), refresh=True)

    def close(self) -> None:
        """Leave the last drawing where it is, show the cursor, and give log lines their stream back."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        for handler in self._moved:
            handler.setStream(sys.stderr)
        self._moved.clear()

    def _open(self) -> Live:
        stream = sys.stderr
        live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
        live.start()  # from here on sys.stderr writes above the drawing
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(sys.stderr)
                self._moved.append(handler)
        return live


def _picture(meter: Meter) -> Table:
    rows = Table.grid(expand=True)
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(ProgressBar(total=max(meter.total_steps, 1), completed=meter.step), Text(meter.place()))
    rows.add_row(line)
    rows.add_row(Text(meter.state(), style="dim"))
    return rows
