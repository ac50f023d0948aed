"""The learning rate's schedules: which `lr_scheduler_kwargs` each takes, and what they must fulfil.

A copy of transformers' functions' parameters (a test holds the two equal): it raises on a wrong one only once
the model is loaded. Does not know files. Start at `check`; what needs the number of steps, `check_steps`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.tuning.arguments.kinds import Range


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule."""

    parameters: Mapping[str, Range] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Parameters of which exactly one must be given."""
    warmup: bool = True
    """Whether `warmup_steps` has an effect."""
    by_loss: bool = False
    """Whether it follows the held-out loss, and so needs evaluations."""


_POSITIVE = Range(above=True)
_SHARE = Range(most=1.0)
_COUNT = Range("int")
_CYCLES = {"num_cycles": _POSITIVE}
_LOWEST = {"min_lr": Range(), "min_lr_rate": _SHARE}
_SHAPE = Range("linear|cosine|1-sqrt")
_BY_LOSS = {
    "mode": Range("min"),
    "factor": Range(above=True, most=1.0),
    "patience": _COUNT,
    "threshold": Range(),
    "threshold_mode": Range("rel|abs"),
    "cooldown": _COUNT,
    "min_lr": Range(),
    "eps": Range(),
}

SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(warmup=False),
    "constant_with_warmup": Schedule(),
    "cosine": Schedule(_CYCLES),
    "cosine_warmup_with_min_lr": Schedule(
        {**_CYCLES, **_LOWEST, "warmup_lr_rate": _SHARE}, needs=("min_lr", "min_lr_rate")
    ),
    "cosine_with_min_lr": Schedule({**_CYCLES, **_LOWEST}, needs=("min_lr", "min_lr_rate")),
    "cosine_with_restarts": Schedule({"num_cycles": Range("int", 1)}),
    "greedy": Schedule(
        {
            **_BY_LOSS,
            "warmup": _COUNT,
            "max_lr": _POSITIVE,
            "verbose": Range("bool"),
            "smooth": Range("bool"),
            "window_size": Range("int", 1),
            "reset_start": _COUNT,
        },
        warmup=False,
        by_loss=True,
    ),
    "inverse_sqrt": Schedule({"timescale": Range("int", 1)}),
    "linear": Schedule(),
    "polynomial": Schedule({"lr_end": Range(), "power": _POSITIVE}),
    "reduce_lr_on_plateau": Schedule(_BY_LOSS, warmup=False, by_loss=True),
    "warmup_stable_decay": Schedule(
        {
            "num_decay_steps": Range("int", 1),
            "num_stable_steps": _COUNT,
            "warmup_type": _SHAPE,
            "decay_type": _SHAPE,
            "min_lr_ratio": _SHARE,
            **_CYCLES,
        },
        needs=("num_decay_steps",),
    ),
}
"""transformers' names."""

_GREEDY_MIN_LR = 1e-3
"""What transformers' GreedyLR takes for `min_lr` where it is not given: it would raise a smaller rate."""


def check(name: str, given: Mapping[str, Any], *, learning_rate: float, where: str) -> dict[str, Any]:
    """Return the parameters of schedule `name`, each of its type; ConfigError for the first wrong one.

    `where` names `lr_scheduler_kwargs` in errors.
    """
    scheduler = SCHEDULES[name]
    for key in given:
        if key not in scheduler.parameters:
            known = ", ".join(scheduler.parameters) or "none"
            raise ConfigError(
                f"{where} has '{key}'{nearest(key, scheduler.parameters)}, but lr_scheduler_type '{name}' "
                f"takes {known}"
            )
    checked = {
        key: scheduler.parameters[key].check(value, f"{where} '{key}'")
        for key, value in given.items()
        if value is not None
    }
    if scheduler.needs and sum(key in checked for key in scheduler.needs) != 1:
        wanted = " or ".join(f"'{key}'" for key in scheduler.needs)
        raise ConfigError(
            f"lr_scheduler_type '{name}' needs {'either ' if len(scheduler.needs) > 1 else ''}{wanted} in "
            f"lr_scheduler_kwargs, such as {{{scheduler.needs[-1]}: {_EXAMPLES[scheduler.needs[-1]]}}}"
        )
    _check_lowest(name, checked, learning_rate)
    return checked


_EXAMPLES = {"min_lr_rate": 0.1, "num_decay_steps": 20}


def _check_lowest(name: str, checked: Mapping[str, Any], learning_rate: float) -> None:
    """Raise ConfigError when a schedule would end above the rate from which it falls."""
    lowest = {key: checked[key] for key in ("lr_end", "min_lr") if key in checked}
    if name == "greedy":
        lowest.setdefault("min_lr", _GREEDY_MIN_LR)
    for key, value in lowest.items():
        if value >= learning_rate:
            raise ConfigError(
                f"lr_scheduler_type '{name}': '{key}' is {value:g}, expected less than learning_rate "
                f"({learning_rate:g}); set it in lr_scheduler_kwargs"
            )


def check_steps(name: str, given: Mapping[str, Any], *, warmup: int, total: int) -> None:
    """Raise ConfigError when the stages of schedule `name` take more than the `total` steps of a run."""
    if not SCHEDULES[name].warmup:
        return
    if warmup >= total:
        raise ConfigError(
            f"'warmup_steps' is {warmup}, but the run has {total} step{'' if total == 1 else 's'}: the "
            "learning rate would only rise; expected fewer, or a share of the steps below 1, such as 0.03"
        )
    stages = {"warmup_steps": warmup}
    stages |= {key: given[key] for key in ("num_stable_steps", "num_decay_steps") if given.get(key)}
    if sum(stages.values()) > total:
        parts = " + ".join(f"{key} {value}" for key, value in stages.items())
        raise ConfigError(f"lr_scheduler_type '{name}': {parts} is more than the run's {total} steps")
