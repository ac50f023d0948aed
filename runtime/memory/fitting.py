"""What fits: the plan of a training process against a device, and the settings that make it fit.

Pure arithmetic over tuning.parts. Does not know jobs or where the numbers come from. Start at `choose`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.hardware import Hardware
from runtime.memory import tuning
from runtime.memory.shape import Shape
from runtime.memory.tuning import MemoryItem, TuningRun

USABLE = {"cuda": 0.92, "cpu": 0.95}
"""Part of a device's memory that a job may count on: a plan is an estimate, and running out costs a night."""
LEAST_TOKENS = {"cuda": 1024, "cpu": 256}
"""A pass of fewer tokens leaves the device idle: checkpointing is the lesser evil then."""
LEAST_ROW = 64
"""Rows are never cut shorter than this to make them fit."""


@dataclass(frozen=True, slots=True)
class Adjustable:
    """What is asked for, and what may be changed to make it fit."""

    row_tokens: int
    """Longest row: a pass holds at least one."""
    checkpointing: bool | None = None
    """None leaves it to the plan."""
    smaller_passes: bool = True
    """A pass may hold fewer tokens than asked for; a step is then more passes, and the same step."""
    shorter_rows: bool = False
    """Rows may be cut shorter than asked for, which loses text."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The memory of one training process at its peak, against what there is."""

    run: TuningRun
    parts: tuple[MemoryItem, ...]
    available_bytes: int
    row_tokens: int

    @property
    def total_bytes(self) -> int:
        return tuning.total(self.parts)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes


def available(hardware: Hardware, *, processes: int = 1) -> int:
    """Return the bytes that one of `processes` may plan with: its GPU's, or its share of the CPU's."""
    shared = processes if hardware.kind == "cpu" else 1
    return int(hardware.memory_bytes * USABLE[hardware.kind] / shared)


def forecast(shape: Shape, run: TuningRun, *, room: int, row_tokens: int) -> Forecast:
    """Return the plan of `run` against `room` bytes."""
    return Forecast(run, tuning.parts(shape, run), room, row_tokens)


def choose(shape: Shape, run: TuningRun, wish: Adjustable, *, room: int) -> Forecast:
    """Return the first way to run that fits into `room` bytes; the thriftiest one when none does.

    In order of cost to the user: as asked; compact (on a CPU); smaller passes, as long as they keep the
    device busy; checkpointing; checkpointing with passes down to one row; rows cut shorter.
    """
    tried = run
    for tried, row in _ways(shape, run, wish, room):
        plan = forecast(shape, tried, room=room, row_tokens=row)
        if plan.fits:
            return plan
    return forecast(shape, tried, room=room, row_tokens=wish.row_tokens)


def _ways(shape: Shape, run: TuningRun, wish: Adjustable, room: int) -> Iterator[tuple[TuningRun, int]]:
    """Yield ways to run from the best on, each with its longest row."""
    row, least = wish.row_tokens, LEAST_TOKENS[run.device]
    for checkpointing in (False, True) if wish.checkpointing is None else (wish.checkpointing,):
        once = replace(run, checkpointing=checkpointing, tokens=max(run.tokens, row))
        if run.device == "cpu":
            if not checkpointing:
                yield once, row
            once = replace(once, compact=True)
        yield once, row
        if not wish.smaller_passes:
            continue
        largest = largest_tokens(shape, once, room=room)
        last = checkpointing or wish.checkpointing is False
        if largest >= (row if last else max(row, least)):
            yield replace(once, tokens=min(largest, once.tokens)), row
        elif last and wish.shorter_rows and largest >= LEAST_ROW:
            yield replace(once, tokens=largest), largest
        elif last:
            yield replace(once, tokens=row), row


def largest_tokens(shape: Shape, run: TuningRun, *, room: int) -> int:
    """Return the most tokens of one pass that fit into `room` bytes, 0 when not even one does."""
    return _largest(lambda tokens: tuning.total(tuning.parts(shape, replace(run, tokens=tokens))) <= room)


def _largest(fits: Callable[[int], bool], limit: int = 1 << 22) -> int:
    """Return the largest number below `limit` that `fits`, for something that fits up to some number."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low - low % 8 if low > 64 else low
