"""What fits: a training process's memory against a device's, and the settings that make it fit.

Pure arithmetic over tuning.parts. Does not know jobs or where the numbers come from. Start at `choose`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.hardware import Hardware
from runtime.memory import tuning
from runtime.memory.shape import Shape
from runtime.memory.tuning import MemoryItem, TuningRun

USABLE = {"cuda": 0.92, "cpu": 0.95}
"""Part of a device's memory that a job may count on: an estimate, and running out loses the run."""
LEAST_TOKENS = {"cuda": 1024, "cpu": 256}
"""A pass of fewer tokens leaves the device idle: checkpointing costs less then."""
SATURATING_TOKENS = {"cuda": 16_384, "cpu": 0}
"""A pass of more tokens gains less than 3 % on a GPU. Each pass expands the 4-bit weights twice, which moves
some 9 bytes a weight, and computes 4 operations a weight and token: at 184 operations a byte (an H200; 156 on
an A100, 139 on a V100) the first is 414 / T of the second, 20 % at 2,048 tokens. On a CPU more tokens than
asked for are not faster."""
ENLARGED = 0.9
"""Part of the usable memory that passes are enlarged to: a plan may be off by the rest."""
LEAST_ROW = 64
"""Rows are never cut shorter than this to make them fit."""


@dataclass(frozen=True, slots=True)
class Adjustable:
    """What a job requests, and what may be adjusted to make it fit."""

    row_tokens: int
    """Longest row: a pass holds at least one."""
    checkpointing: bool | None = None
    """None: chosen by what fits."""
    smaller_passes: bool = True
    """A pass may hold fewer tokens than requested; a step is then more passes, and the same step."""
    larger_passes: int = 0
    """A pass may hold up to so many tokens, where they fit: the same step in fewer passes."""
    shorter_rows: bool = False
    """Rows may be cut shorter than requested, which loses text."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The memory of one training process at its peak, and the memory available to it."""

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
    """Return the bytes that each of `processes` may plan with: its GPU's, or its part of the CPU's."""
    divided_by = processes if hardware.kind == "cpu" else 1
    return int(hardware.memory_bytes * USABLE[hardware.kind] / divided_by)


def forecast(shape: Shape, run: TuningRun, *, room: int, row_tokens: int) -> Forecast:
    """Return the plan of `run` against `room` bytes."""
    return Forecast(run, tuning.parts(shape, run), room, row_tokens)


def choose(shape: Shape, run: TuningRun, adjustable: Adjustable, *, room: int) -> Forecast:
    """Return the first candidate that fits into `room` bytes; the one with the least memory when none does.

    In order of cost to the user: as requested, or in larger passes where they are allowed; compact (on a
    CPU); smaller passes, as long as they keep the device busy; checkpointing; checkpointing with passes down
    to one row; rows cut shorter.
    """
    candidate = run
    for candidate, row_tokens in _candidates(shape, run, adjustable, room):
        plan = forecast(shape, candidate, room=room, row_tokens=row_tokens)
        if plan.fits:
            return plan
    return forecast(shape, candidate, room=room, row_tokens=adjustable.row_tokens)


def _candidates(
    shape: Shape, run: TuningRun, adjustable: Adjustable, room: int
) -> Iterator[tuple[TuningRun, int]]:
    """Yield settings to try, the best first, each with its longest row."""
    row, least = adjustable.row_tokens, LEAST_TOKENS[run.device]
    for checkpointing in (False, True) if adjustable.checkpointing is None else (adjustable.checkpointing,):
        once = replace(run, checkpointing=checkpointing, tokens=max(run.tokens, row))
        if adjustable.larger_passes > once.tokens:
            roomy = largest_tokens(shape, once, room=int(room * ENLARGED))
            if roomy > once.tokens:
                yield replace(once, tokens=min(roomy, adjustable.larger_passes)), row
        if run.device == "cpu":
            if not checkpointing:
                yield once, row
            once = replace(once, compact=True)
        yield once, row
        if not adjustable.smaller_passes:
            continue
        largest = largest_tokens(shape, once, room=room)
        last = checkpointing or adjustable.checkpointing is False
        if largest >= (row if last else max(row, least)):
            yield replace(once, tokens=min(largest, once.tokens)), row
        elif last and adjustable.shorter_rows and largest >= LEAST_ROW:
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
