"""How far a job is: its phase, the metrics of training, and where they are reported.

Does not know torch; the trainer counts into a `Throughput`. Start at `JobProgress`, then
`Throughput.metrics` and `Reporter`.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from runtime import hardware
from runtime.files import write_atomic
from runtime.tuning.settings import TuningJob

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
"""Least time between two progress lines in a log."""

STALLED_S = 600.0
"""A run without a step for this long (or 20 times its usual step) is called stalled."""

Metrics = Mapping[str, float | int | None]
"""Metrics by name, with the unit in the name; None for what is not known yet, or is not finite."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What a job answers about itself at one moment."""

    job: str
    model: str
    phase: str
    """Its present step: data, encode, model, evaluate, train, save, publish."""
    stalled: bool = False
    """No step has ended for far too long."""
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Activity:
    """What a job does between two steps, and how far it is."""

    name: str
    done: int
    total: int
    seconds: float = 0.0
    """Since it began; 0 where its speed tells nobody anything."""

    def __str__(self) -> str:
        text = f"{self.name} {self.done}/{self.total}"
        if not self.seconds or not self.done:
            return text
        each = self.seconds / self.done
        return f"{text} {1 / each:.0f}/s left {duration(each * (self.total - self.done))}"


@dataclass(slots=True)
class Throughput:
    """Running metrics of one training run in this process, over all ranks where they are global."""

    total_steps: int = 0
    world_size: int = 1
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    epoch: float = 0.0
    loss: float = float("nan")
    held_out_loss: float = float("nan")
    learning_rate: float = float("nan")
    gradient_norm: float = float("nan")
    tokens: int = 0
    """Real tokens this rank has trained on, padding not counted."""
    trained_tokens: int = 0
    """Tokens of all ranks that counted in the loss."""
    first_step: int = 0
    """Step that this process began at: more than 0 after a resume."""
    started: float = 0.0
    last_step_at: float = 0.0
    activity: Activity | None = None
    """What the job does now, where that is no step."""

    def start(self, step: int, total_steps: int, logged: Iterable[Mapping[str, float]] = ()) -> None:
        """Begin to count time, at `step` of `total_steps`; a resumed run has `logged` metrics before."""
        for entry in logged:
            self.log(step, entry)
        self.started = self.last_step_at = self.clock()
        self.step, self.first_step, self.total_steps = step, step, total_steps

    def count(self, tokens: int, trained_tokens: int) -> None:
        """Add one step's tokens (of this rank) and the tokens in its loss (of all ranks)."""
        self.tokens += tokens
        self.trained_tokens += trained_tokens

    def advance(self, step: int, epoch: float) -> None:
        """Record that `step` is done."""
        self.step, self.epoch, self.last_step_at = step, epoch, self.clock()

    def log(self, step: int, logged: Mapping[str, float]) -> None:
        """Record what the trainer logs."""
        self.step = step
        self.epoch = logged.get("epoch", self.epoch)
        self.loss = logged.get("loss", self.loss)
        self.held_out_loss = logged.get("eval_loss", self.held_out_loss)
        self.learning_rate = logged.get("learning_rate", self.learning_rate)
        self.gradient_norm = logged.get("grad_norm", self.gradient_norm)

    @property
    def seconds(self) -> float:
        return max(self.clock() - self.started, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second over all ranks, taking this one as typical."""
        return self.tokens * self.world_size / self.seconds

    @property
    def trained_share(self) -> float:
        """Part of the tokens that count in the loss."""
        return self.trained_tokens / (self.tokens * self.world_size) if self.tokens else 0.0

    @property
    def remaining_s(self) -> float:
        """Expected time to the last step; NaN before the first."""
        done = self.step - self.first_step
        return self.seconds / done * (self.total_steps - self.step) if done else float("nan")

    @property
    def stalled(self) -> bool:
        """Whether no step has ended for far longer than steps take here; never before the first."""
        done = self.step - self.first_step
        mean_step_s = (self.last_step_at - self.started) / done if done else float("inf")
        return self.clock() - self.last_step_at > max(STALLED_S, 20 * mean_step_s)

    def metrics(self) -> Metrics:
        """Return everything by name and unit, for a log line's fields, Prometheus and the history."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": round(self.epoch, 3),
            "loss": _finite(self.loss),
            "held_out_loss": _finite(self.held_out_loss),
            "learning_rate": _finite(self.learning_rate),
            "gradient_norm": _finite(self.gradient_norm),
            "tokens": self.tokens * self.world_size,
            "trained_tokens": self.trained_tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "trained_share": round(self.trained_share, 4),
            "memory_bytes": memory_bytes(),
            "remaining_s": _finite(round(self.remaining_s, 1)),
        }

    def position_text(self) -> str:
        """Return how far the run is, for people."""
        if self.activity is not None:
            return str(self.activity)
        left = "?" if math.isnan(self.remaining_s) else duration(self.remaining_s)
        return f"step {self.step}/{self.total_steps} epoch {self.epoch:.2f} left {left}"

    def metrics_text(self) -> str:
        """Return the losses and the speed, for people; what is not measured yet is left out."""
        measured = (
            ("loss", self.loss, ".4f"),
            ("held-out", self.held_out_loss, ".4f"),
            ("lr", self.learning_rate, ".2e"),
            ("grad", self.gradient_norm, ".3f"),
        )
        known = "".join(f"{name} {value:{form}} " for name, value, form in measured if not math.isnan(value))
        return (
            f"{known}{self.tokens_per_s:.0f} tokens/s ({self.trained_share:.0%} trained) "
            f"memory {memory_bytes() / 2**30:.1f} GiB"
        )


@dataclass(slots=True)
class JobProgress:
    """Where a job is, for failure records and for /health."""

    throughput: Throughput = field(default_factory=Throughput)
    phase: str = "start"

    def enter(self, phase: str) -> None:
        """Begin `phase`."""
        self.phase = phase
        log.debug("phase %s", phase)

    def state(self, job: TuningJob) -> JobState:
        """Return what /metrics and /health show of `job` now."""
        stalled = self.phase == "train" and self.throughput.stalled
        return JobState(job.name, job.model.name, self.phase, stalled, self.throughput.metrics())


@dataclass(frozen=True, slots=True)
class MetricsHistory:
    """A JSONL file of metrics, with a "step" in every line."""

    path: Path

    def truncate(self, step: int) -> None:
        """Drop the entries after `step`, and a line that a killed process left incomplete."""
        if self.path.is_file():
            kept = [entry for entry in self.entries() if entry["step"] <= step] if step else []
            write_atomic(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def append(self, metrics: Metrics) -> None:
        """Append one entry."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics, allow_nan=False) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries, oldest first; lines that are not entries are skipped."""
        if not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
        return entries


class Display(Protocol):
    """Something on a screen that shows a `Throughput` while training runs."""

    def show(self, throughput: Throughput) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Reporter:
    """Reports a `Throughput`: to the history at every entry, and to a display or now and then to the log."""

    throughput: Throughput
    history: MetricsHistory | None = None
    display: Display | None = None
    clock: Callable[[], float] = time.monotonic
    interval_s: float = LOG_INTERVAL_S
    """Least time between two lines of the log."""
    last_line_at: float = float("-inf")
    last_line: tuple[int, float, float] | None = None
    """Step, loss and held-out loss of the last line of training in the log."""
    activity_began: float = 0.0

    def begin(self) -> None:
        """Cut the history at the present step: a resumed run repeats the later ones."""
        if self.history is not None:
            self.history.truncate(self.throughput.step)

    def record(self) -> None:
        """Write a history entry, and show it."""
        if self.history is not None:
            self.history.append(self.throughput.metrics())
        self.show()

    def show(self, *, last: bool = False) -> None:
        """Update the display; without one, log a line every `LOG_INTERVAL_S`, and always the `last`, once."""
        if self.display is not None:
            self.display.show(self.throughput)
            return
        says = (self.throughput.step, self.throughput.loss, self.throughput.held_out_loss)
        repeated = self.last_line is not None and str(says) == str(self.last_line)  # NaN is as it was
        if self.clock() - self.last_line_at >= self.interval_s or (last and not repeated):
            self.last_line_at, self.last_line = self.clock(), says
            line = f"{self.throughput.position_text()} {self.throughput.metrics_text()}"
            log.info("%s", line, extra={"fields": self.throughput.metrics()})

    def show_activity(self, name: str, done: int, total: int, *, with_speed: bool = False) -> None:
        """Show how far something other than training is: like `show`, but no line of the log is its last."""
        now, begins = self.clock(), self.throughput.activity is None
        if begins:
            self.activity_began = now
        seconds = now - self.activity_began if with_speed else 0.0
        self.throughput.activity = Activity(name, done, total, seconds)
        if self.display is not None:
            self.display.show(self.throughput)
        elif begins:
            self.last_line_at = now  # the first line comes where it takes long
        elif now - self.last_line_at >= self.interval_s:
            self.last_line_at = now
            log.info("%s", self.throughput.activity)
        if done >= total:
            self.end_activity()

    def end_activity(self) -> None:
        """Take away what `show_activity` showed, where it ends before its last part."""
        self.throughput.activity = None

    def close(self) -> None:
        """Restore the screen, however training ended."""
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
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    return hardware.peak_resident_bytes()


def _finite(value: float) -> float | None:
    """Return `value`, None where JSON and Prometheus have no representation of it."""
    return value if math.isfinite(value) else None
