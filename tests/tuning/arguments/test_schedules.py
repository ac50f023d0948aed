"""The schedules' parameters are transformers' own, and a wrong one is named."""

import inspect
import re
from typing import Any

import pytest
import torch

from runtime.errors import ConfigError
from runtime.tuning.arguments import schedules
from runtime.tuning.arguments.schedules import SCHEDULES

_OWN = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def test_table_is_transformers_own() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    classes = {"reduce_lr_on_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau, "greedy": GreedyLR}
    theirs = {
        kind.value: set(inspect.signature(classes.get(kind.value, function)).parameters) - _OWN
        for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    }
    assert {name: set(scheduler.parameters) for name, scheduler in SCHEDULES.items()} == theirs


GIVEN: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 4},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5, "warmup_lr_rate": 0.5},
    "polynomial": {"lr_end": 1e-5, "power": 2},
    "greedy": {"min_lr": 1e-6, "smooth": True},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 2, "threshold_mode": "abs"},
    "inverse_sqrt": {"timescale": 10},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine": {"num_cycles": 0.4},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_accepted_makes_a_schedule(name: str) -> None:
    from transformers import get_scheduler

    given = schedules.check(name, GIVEN.get(name, {}), learning_rate=1e-3, where="'lr_scheduler_kwargs'")
    schedules.check_steps(name, given, warmup=3, total=20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    get_scheduler(name, optimizer, 3, 20, scheduler_specific_kwargs=given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cosine", {"foo": 1}, "has 'foo', but lr_scheduler_type 'cosine' takes num_cycles"),
        ("linear", {"num_cycles": 1}, "takes none"),
        ("constant", {"num_cycles": 1}, "takes none"),
        ("cosine_with_min_lr", {}, "needs either 'min_lr' or 'min_lr_rate' in lr_scheduler_kwargs, such as"),
        ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "needs either 'min_lr' or 'min_lr_rate'"),
        ("cosine_with_min_lr", {"min_lr": 1}, "'min_lr' is 1, expected less than learning_rate (0.001)"),
        ("warmup_stable_decay", {}, "needs 'num_decay_steps' in lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "exp"}, "'decay_type' is 'exp'"),
        ("polynomial", {"lr_end": 1.0}, "'lr_end' is 1, expected less than learning_rate (0.001)"),
        ("polynomial", {"power": "two"}, "'power' is 'two', expected a number"),
        ("greedy", {}, "'min_lr' is 0.001, expected less than learning_rate"),
        ("reduce_lr_on_plateau", {"mode": "max"}, "'mode' is 'max', expected min"),
        ("cosine_with_min_lr", {"min_lr_rat": 0.1}, "did you mean 'min_lr_rate'"),
        ("cosine", {"num_cycles": float("nan")}, "'num_cycles' is nan"),
    ],
)
def test_wrong_parameters_are_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        schedules.check(name, given, learning_rate=1e-3, where="'lr_scheduler_kwargs'")


@pytest.mark.parametrize(
    ("name", "given", "warmup", "fits"),
    [
        ("linear", {}, 9, True),
        ("linear", {}, 10, False),
        ("polynomial", {}, 10, False),
        ("constant", {}, 100, True),
        ("warmup_stable_decay", {"num_decay_steps": 8}, 2, True),
        ("warmup_stable_decay", {"num_decay_steps": 9}, 2, False),
        ("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": 4}, 2, False),
    ],
)
def test_stages_fit_into_the_run(name: str, given: dict[str, Any], warmup: int, fits: bool) -> None:
    if fits:
        schedules.check_steps(name, given, warmup=warmup, total=10)
        return
    with pytest.raises(ConfigError, match="10 steps"):
        schedules.check_steps(name, given, warmup=warmup, total=10)
