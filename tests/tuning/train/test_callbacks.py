"""Callbacks between two steps: checkpoints by the clock and on a signal."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.train.callbacks import CheckpointCallback


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])


def step_end(callback: CheckpointCallback, args: TrainingArguments, *, step: int = 1) -> TrainerControl:
    control = TrainerControl()
    callback.on_step_end(args, TrainerState(global_step=step, max_steps=10), control)
    return control


def test_checkpoint_is_due_when_the_interval_has_passed(args: TrainingArguments) -> None:
    now = 0.0
    callback = CheckpointCallback(Ranks(), StopSignal(), minutes=10, keep=2, clock=lambda: now)
    now = 599.0
    assert not step_end(callback, args).should_save
    now = 600.0
    assert step_end(callback, args).should_save


def test_signal_saves_and_stops_except_after_the_last_step(args: TrainingArguments) -> None:
    stop = StopSignal()
    stop.requested = True
    callback = CheckpointCallback(Ranks(), stop, minutes=None, keep=2)
    control = step_end(callback, args, step=10)
    assert not control.should_training_stop
    assert not callback.stopped
    control = step_end(callback, args, step=9)
    assert control.should_save
    assert control.should_training_stop
    assert callback.stopped
