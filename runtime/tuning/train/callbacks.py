"""Trainer callbacks, which run between two steps: checkpoints, SIGTERM, progress, float16's loss scaler.

Each is given only what it needs. Does not know batches or losses.
Start at `CheckpointCallback.on_step_end`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runtime.errors import DivergedError
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.train import checkpoints
from runtime.tuning.train.checkpoint_sync import RegistryCheckpoints, gather_random_states
from runtime.tuning.train.progress import Reporter, Throughput

MAX_SKIPPED_STEPS = 25
"""Steps in a row that float16's loss scaler may skip: its scale begins at 2**16 and is 2**-9 by then."""


class CheckpointCallback(TrainerCallback):
    """Takes checkpoints by the clock and on SIGTERM, and seals every one that Trainer writes.

    All ranks save at the same step: an all-reduce of their flags decides.
    """

    def __init__(
        self,
        ranks: Ranks,
        stop: StopSignal,
        *,
        minutes: float | None,
        keep: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ranks, self.stop, self.keep, self.clock = ranks, stop, keep, clock
        self.interval_s = minutes * 60 if minutes else float("inf")
        self.saved_at = clock()
        self.registry: RegistryCheckpoints | None = None
        """Where checkpoints go besides the disk; set on rank 0."""
        self.stopped = False
        """Whether training ended after a checkpoint because of a signal."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.saved_at = self.clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        due = self.ranks.is_main and self.clock() - self.saved_at >= self.interval_s
        any_stop, any_due = self.ranks.any_of((self.stop.requested, due), str(args.device))
        if any_due:
            control.should_save = True
        if any_stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"
        if self.ranks.world_size > 1:
            gather_random_states(checkpoint, self.ranks)
        if self.ranks.is_main:
            checkpoints.seal(checkpoint)
            checkpoints.prune(folder, self.keep)
            if self.registry is not None:
                self.registry.save(checkpoint)
        self.ranks.barrier()
        self.saved_at = self.clock()


class ProgressCallback(TrainerCallback):
    """Counts steps into the throughput and has them reported; on rank 0 only."""

    def __init__(self, throughput: Throughput, reporter: Reporter) -> None:
        self.throughput, self.reporter = throughput, reporter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.throughput.start(state.global_step, state.max_steps, state.log_history)
        self.reporter.begin()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        # Trainer tells it with the next logged loss only, and then a line about another step has it
        self.throughput.learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.throughput.advance(state.global_step, state.epoch or 0.0)
        if not control.should_log:  # else `on_log` reports, with this step's loss
            self.reporter.show()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        if logs and ("loss" in logs or "eval_loss" in logs):
            self.throughput.log(state.global_step, logs)
            self.reporter.record()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.reporter.show(last=True)


class LossScaleCallback(TrainerCallback):
    """Ends a float16 run whose gradients overflow at every scale.

    A single infinity is no failure: the loss scaler skips that step, and halves the scale. A run that skips
    them all would last hours and save its first weights.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Steps in a row that the loss scaler skipped."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if not args.fp16:
            return
        self.skipped = self.skipped + 1 if optimizer.step_was_skipped else 0
        if self.skipped >= MAX_SKIPPED_STEPS:
            self._fail(args, state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if (
            0 < self.skipped == state.global_step
        ):  # no step was taken: the job has fewer than MAX_SKIPPED_STEPS
            self._fail(args, state.global_step)

    def _fail(self, args: TrainingArguments, step: int) -> NoReturn:
        raise DivergedError(
            f"{self.skipped} steps in a row, up to step {step}, had NaN or infinite gradients in float16; "
            f"lower learning_rate (now {args.learning_rate:g}) or use a GPU with bfloat16; "
            "the last checkpoint stays"
        )
