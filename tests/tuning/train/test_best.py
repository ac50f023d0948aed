"""The step with the lowest held-out loss is what a run keeps, after a resume too."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runtime.errors import ConfigError, StoppedError
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.identity import JobIdentity
from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.best import BestWeights
from runtime.tuning.train.checkpoints import listed
from runtime.tuning.train.setup import TrainingSetup, run_training
from tests.tuning.train.test_trainer import training_setup

Maker = Callable[..., TuningJob]
Weights = dict[str, torch.Tensor]

STEPS = 10
WORSENS = {
    "learning_rate": 0.02, "max_steps": STEPS, "warmup_steps": 0, "load_best_model_at_end": True,
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3,
    "save_total_limit": 1,
}  # fmt: skip

STRANGE = TokenizedSequence(np.arange(400, 440, dtype=np.int32), np.ones(40, dtype=np.bool_))
"""A row of tokens that no row of the data holds: its loss rises with every step."""


def trained(setup: TrainingSetup) -> Weights:
    return {name: p.detach().clone() for name, p in setup.model.named_parameters() if p.requires_grad}


class Recorder(TrainerCallback):
    """Keeps the weights of every evaluation; asks the run to stop after `stop_at`."""

    def __init__(self, setup: TrainingSetup, stop_at: int | None = None) -> None:
        self.setup, self.stop_at = setup, stop_at
        self.weights: dict[int, Weights] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.weights[state.global_step] = trained(self.setup)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step + 1 == self.stop_at:
            self.setup.rank.stop.requested = True


def run(job: TuningJob, *, stop_at: int | None = None) -> tuple[TrainingSetup, Recorder]:
    setup = training_setup(job, held_out=(STRANGE,))
    recorder = Recorder(setup, stop_at)
    setup.trainer.add_callback(recorder)
    run_training(setup, folder=OutputPaths(job.output.folder).checkpoints, owner=JobIdentity({}))
    return setup, recorder


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_kept_are_the_weights_of_the_lowest_held_out_loss_though_it_came_long_before_a_resume(
    make_job: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        whole, recorder = run(make_job("whole", training=WORSENS))
    losses = dict(whole.logged("eval_loss"))
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 6  # else this run shows nothing
    assert sorted(losses) == [2, 4, 6, 8, 10]  # the last step is compared, too
    assert whole.kept_step == best
    assert same(trained(whole), recorder.weights[best])
    assert f"kept step {best} of 10: loss {losses[best]:.4f} is the lowest of 5 evaluations" in caplog.text
    curve = whole.held_out_curve(7.0, losses[best])
    assert curve == ((0, 7.0), *sorted(losses.items()))

    job = make_job("resumed", training=WORSENS)
    with pytest.raises(StoppedError):
        run(job, stop_at=7)
    (checkpoint,) = listed(OutputPaths(job.output.folder).checkpoints)
    assert checkpoint.name == "checkpoint-7"
    resumed, _ = run(make_job("resumed", training=WORSENS))
    assert resumed.kept_step == best
    assert same(trained(resumed), trained(whole))


def test_value_shown_after_a_resume_is_the_last_one_measured(make_job: Maker) -> None:
    job = make_job(training=WORSENS)
    with pytest.raises(StoppedError):
        run(job, stop_at=5)
    setup = training_setup(job, held_out=(STRANGE,))
    setup.throughput.held_out_loss = 99.0  # of the untrained adapter, measured before training goes on
    shown: list[float] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            shown.append(setup.throughput.held_out_loss)
            setup.rank.stop.requested = True

    setup.trainer.add_callback(Look())
    with pytest.raises(StoppedError):
        run_training(setup, folder=OutputPaths(job.output.folder).checkpoints, owner=JobIdentity({}))
    assert shown == [dict(setup.logged("eval_loss"))[4]]


def test_without_evaluations_nothing_is_restored(make_job: Maker) -> None:
    setup = training_setup(make_job(training={"max_steps": 1}))
    before = trained(setup)
    BestWeights(setup.model, setup.rank.ranks, metric="eval_loss").restore()
    assert same(trained(setup), before)
    assert setup.kept_step == 0


def test_best_step_without_held_out_rows_is_refused(make_job: Maker) -> None:
    with pytest.raises(ConfigError, match="needs the loss of held-out rows"):
        training_setup(make_job(training={"load_best_model_at_end": True}))
