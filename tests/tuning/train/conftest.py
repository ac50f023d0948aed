"""A clock that tests move, and a step on it."""

import pytest

from runtime.tuning.train.progress import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take_step(throughput: Throughput, step: int, clock: Clock, seconds: float = 2.0) -> None:
    clock.now += seconds
    throughput.count(tokens=100, trained_tokens=50)
    throughput.advance(step, 0.1)
    throughput.log(step, {"loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5, "epoch": 0.1})
