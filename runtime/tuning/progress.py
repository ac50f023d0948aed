"""How far a run is: the figures, and the line that says them every few seconds.

Does not know torch; the trainer counts into a `Meter`. Start at `Meter.line`.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0
"""Least time between two progress lines in a log."""


@dataclass(slots=True)
class Meter:
    """Running figures of one training run in this process, over all ranks where they are global."""

    total_steps: int = 0
    world: int = 1
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    epoch: float = 0.0
    loss: float = float("nan")
    learning_rate: float = 0.0
    gradient_norm: float = float("nan")
    tokens: int = 0
    """Real tokens this rank has trained on, padding not counted."""
    targets: int = 0
    """Tokens of all ranks that counted in the loss."""
    first_step: int = 0
    """Step that this process began at: more than 0 after a resume."""
    started: float = field(default=0.0)

    def start(self, step: int, total_steps: int) -> None:
        """Begin to count time, at `step` of `total_steps`."""
        self.started, self.step, self.first_step, self.total_steps = self.clock(), step, step, total_steps

    def count(self, tokens: int, targets: int) -> None:
        """Add one step's tokens (of this rank) and learnt tokens (of all)."""
        self.tokens += tokens
        self.targets += targets

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take over what the trainer logs."""
        self.step = step
        self.epoch = figures.get("epoch", self.epoch)
        self.loss = figures.get("loss", self.loss)
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
        """Expected time to the last step; -1 before the first."""
        done = self.step - self.first_step
        return self.seconds / done * (self.total_steps - self.step) if done else -1.0

    def figures(self) -> dict[str, float | int]:
        """Return everything by name and unit, for a log line's fields, metrics and the history."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": round(self.epoch, 3),
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "trained_share": round(self.trained_share, 4),
            "memory_bytes": memory_bytes(),
            "remaining_s": round(self.remaining_s, 1),
        }

    def line(self) -> str:
        """Return the figures for people, in one line."""
        left = (
            time.strftime("%H:%M:%S", time.gmtime(self.remaining_s)) if self.step > self.first_step else "?"
        )
        return (
            f"step {self.step}/{self.total_steps} epoch {self.epoch:.2f} loss {self.loss:.4f} "
            f"lr {self.learning_rate:.2e} grad {self.gradient_norm:.3f} {self.tokens_per_s:.0f} tokens/s "
            f"({self.trained_share:.0%} trained) memory {memory_bytes() / 2**30:.1f} GiB left {left}"
        )


@dataclass(slots=True)
class Reporter:
    """Says a `Meter`'s figures: to the log now and then, to the history file every time."""

    meter: Meter
    history: Path | None = None
    clock: Callable[[], float] = time.monotonic
    said: float = float("-inf")

    def report(self, *, last: bool = False) -> None:
        """Write a history entry, and a log line when the last one is `LINE_SECONDS` ago.

        `last` says the last figures once more and writes no entry.
        """
        if self.history is not None and not last:
            with self.history.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.meter.figures()) + "\n")
        if last or self.clock() - self.said >= LINE_SECONDS:
            self.said = self.clock()
            log.info("%s", self.meter.line(), extra={"fields": self.meter.figures()})


def memory_bytes() -> int:
    """Return the peak memory of this process: of its GPU when it uses one, else resident."""
    import resource
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
