"""How far a run is: the figures, and who is told them.

Does not know torch; the trainer counts into a `Throughput`. Start at `Throughput.figures` and `Reporter`.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime import hardware
from runtime.files import write_atomic


@dataclass(frozen=True, slots=True)
class MetricsHistory:
    """A JSONL file with a "step" in every line."""

    path: Path

    def keep(self, step: int) -> None:
        """Drop what was written after `step`, and a line that a killed process left half done."""
        if self.path.is_file():
            kept = [entry for entry in self.entries() if entry["step"] <= step] if step else []
            write_atomic(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def add(self, figures: Mapping[str, Any]) -> None:
        """Append one entry."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures, allow_nan=False) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries in order of time; lines that are none are passed over."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found


log = logging.getLogger(__name__)

LINE_SECONDS = 5.0
"""Least time between two progress lines in a log."""

PATIENCE_S = 600.0
"""A run without a step for this long (or 20 times its usual step) is called stalled."""

Figures = Mapping[str, float | int | None]
"""Named figures with their unit in the name; None for what is not known yet, or is no finite number."""


@dataclass(slots=True)
class Throughput:
    """Running figures of one training run in this process, over all ranks where they are global."""

    total_steps: int = 0
    world: int = 1
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    epoch: float = 0.0
    loss: float = float("nan")
    held_out_loss: float = float("nan")
    learning_rate: float = float("nan")
    gradient_norm: float = float("nan")
    tokens: int = 0
    """Real tokens this rank has trained on, padding not counted."""
    targets: int = 0
    """Tokens of all ranks that counted in the loss."""
    first_step: int = 0
    """Step that this process began at: more than 0 after a resume."""
    started: float = field(default=0.0)
    stepped: float = field(default=0.0)
    """When the last step ended."""

    def start(self, step: int, total_steps: int) -> None:
        """Begin to count time, at `step` of `total_steps`."""
        self.started = self.stepped = self.clock()
        self.step, self.first_step, self.total_steps = step, step, total_steps

    def count(self, tokens: int, targets: int) -> None:
        """Add one step's tokens (of this rank) and learnt tokens (of all)."""
        self.tokens += tokens
        self.targets += targets

    def advance(self, step: int, epoch: float) -> None:
        """Take over that `step` is done."""
        self.step, self.epoch, self.stepped = step, epoch, self.clock()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take over what the trainer logs."""
        self.step = step
        self.epoch = figures.get("epoch", self.epoch)
        self.loss = figures.get("loss", self.loss)
        self.held_out_loss = figures.get("eval_loss", self.held_out_loss)
        self.learning_rate = figures.get("learning_rate", self.learning_rate)
        self.gradient_norm = figures.get("grad_norm", self.gradient_norm)

    @property
    def seconds(self) -> float:
        return max(self.clock() - self.started, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second over all ranks, taking this one as typical."""
        return self.tokens * self.world / self.seconds

    @property
    def trained_share(self) -> float:
        """Part of the tokens that count in the loss."""
        return self.targets / (self.tokens * self.world) if self.tokens else 0.0

    @property
    def remaining_s(self) -> float:
        """Expected time to the last step; NaN before the first."""
        done = self.step - self.first_step
        return self.seconds / done * (self.total_steps - self.step) if done else float("nan")

    @property
    def stalled(self) -> bool:
        """Whether no step has ended for far longer than steps take here; never before the first."""
        done = self.step - self.first_step
        usual = (self.stepped - self.started) / done if done else float("inf")
        return self.clock() - self.stepped > max(PATIENCE_S, 20 * usual)

    def figures(self) -> Figures:
        """Return everything by name and unit, for a log line's fields, metrics and the history."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": round(self.epoch, 3),
            "loss": _finite(self.loss),
            "held_out_loss": _finite(self.held_out_loss),
            "learning_rate": _finite(self.learning_rate),
            "gradient_norm": _finite(self.gradient_norm),
            "tokens": self.tokens * self.world,
            "trained_tokens": self.targets,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "trained_share": round(self.trained_share, 4),
            "memory_bytes": memory_bytes(),
            "remaining_s": _finite(round(self.remaining_s, 1)),
        }

    def place(self) -> str:
        """Return how far the run is, for people."""
        left = "?" if math.isnan(self.remaining_s) else duration(self.remaining_s)
        return f"step {self.step}/{self.total_steps} epoch {self.epoch:.2f} left {left}"

    def state(self) -> str:
        """Return how the run does, for people."""
        held_out = "" if math.isnan(self.held_out_loss) else f" held-out {self.held_out_loss:.4f}"
        return (
            f"loss {self.loss:.4f}{held_out} lr {self.learning_rate:.2e} grad {self.gradient_norm:.3f} "
            f"{self.tokens_per_s:.0f} tokens/s ({self.trained_share:.0%} trained) "
            f"memory {memory_bytes() / 2**30:.1f} GiB"
        )


class Display(Protocol):
    """Something on a screen that shows a `Throughput` while it moves."""

    def show(self, meter: Throughput) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Reporter:
    """Reports a `Throughput`: on a display, or in the log now and then; to the history at every entry."""

    meter: Throughput
    history: MetricsHistory | None = None
    display: Display | None = None
    clock: Callable[[], float] = time.monotonic
    said: float = float("-inf")

    def begin(self) -> None:
        """Start with the history up to the meter's step: a resumed run does the later ones again."""
        if self.history is not None:
            self.history.keep(self.meter.step)

    def enter(self) -> None:
        """Write a history entry, and tell."""
        if self.history is not None:
            self.history.add(self.meter.figures())
        self.tell()

    def tell(self, *, last: bool = False) -> None:
        """Show the figures; in the log when the last line is `LINE_SECONDS` ago, or when it is the `last`."""
        if self.display is not None:
            self.display.show(self.meter)
        elif last or self.clock() - self.said >= LINE_SECONDS:
            self.said = self.clock()
            line = f"{self.meter.place()} {self.meter.state()}"
            log.info("%s", line, extra={"fields": self.meter.figures()})

    def close(self) -> None:
        """Leave the screen as it should be, however training ended."""
        if self.display is not None:
            self.display.close()


def duration(seconds: float) -> str:
    """Return a time span as people write it: 0:07, 1:02:03, 2d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def memory_bytes() -> int:
    """Return the peak memory of this process: of its GPU when it uses one, else resident."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    return hardware.peak_resident_bytes()


def _finite(value: float) -> float | None:
    """Return `value`, None where JSON and Prometheus have no word for it."""
    return value if math.isfinite(value) else None


REFRESH_S = 0.1
"""Least time between two drawings."""


class TerminalBar:
    """A `Display` at the bottom of the terminal that `console` (standard error) writes to."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.clock = clock
        self.drawn = float("-inf")
        self.live: Live | None = None
        self._moved: list[logging.StreamHandler] = []  # type: ignore[type-arg]

    def show(self, meter: Throughput) -> None:
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


def _picture(meter: Throughput) -> Table:
    rows = Table.grid(expand=True)
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(ProgressBar(total=max(meter.total_steps, 1), completed=meter.step), Text(meter.place()))
    rows.add_row(line)
    rows.add_row(Text(meter.state(), style="dim"))
    return rows
