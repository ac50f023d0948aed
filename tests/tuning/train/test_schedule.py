"""Settings become steps, passes and Trainer's arguments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.hardware import Hardware
from runtime.model_source import ModelSource
from runtime.tuning.arguments.training import DEFAULTS
from runtime.tuning.data.batching import BatchPlan
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence
from runtime.tuning.precision import Precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import Encoding, TuningJob
from runtime.tuning.train.schedule import batch_plan, choose_layout, schedule_evaluations, trainer_arguments

CPU = Hardware("cpu", "test", None, 8 << 30, 1)
GPU = Hardware("cuda", "A100", (8, 0), 80 << 30, 1)


def job(training: dict[str, Any] | None = None, **settings: Any) -> TuningJob:
    return TuningJob(name="j", model=ModelSource(name="m"), training=training or {}, **settings)


def rows(count: int, length: int = 50) -> TokenizedData:
    sequence = TokenizedSequence(np.ones(length, dtype=np.int32), np.ones(length, dtype=np.bool_))
    return TokenizedData((sequence,) * count)


def plan(
    job: TuningJob, count: int = 2000, world: int = 1, hardware: Hardware = CPU, length: int = 50
) -> BatchPlan:
    return batch_plan(
        job, rows(count, length), layout="packed", ranks=Ranks(world_size=world), hardware=hardware
    )


def test_batch_size_times_accumulation_times_ranks_is_a_step() -> None:
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert plan(job(batches)).rows_per_step == 8
    assert plan(job(batches), world=3).rows_per_step == 24


def test_silent_user_gets_the_same_steps_on_any_number_of_ranks() -> None:
    assert [plan(job(), world=world).rows_per_step for world in (1, 2, 8)] == [16] * 3


def test_small_data_gets_small_steps() -> None:
    assert [plan(job(), count).rows_per_step for count in (3, 60, 200, 500, 5000)] == [3, 4, 4, 10, 16]


def test_a_pass_holds_at_least_the_longest_row() -> None:
    assert plan(job()).budget_tokens == 1024
    assert plan(job(), length=1500).budget_tokens == 1500
    given = job({"per_device_train_batch_size": 4}, encoding=Encoding(max_tokens=512))
    assert plan(given, hardware=GPU).budget_tokens == 2048
    assert plan(job(), hardware=GPU).budget_tokens == 2048


def test_unknown_families_are_not_packed(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_layout("auto", "llama") == "packed"
    assert choose_layout("sorted", "llama") == "sorted"
    assert choose_layout("auto", "falcon") == "sorted"
    assert not caplog.records
    assert choose_layout("packed", "falcon") == "sorted"
    assert "not safe for falcon" in caplog.text


def test_user_arguments_stand_over_ours_and_the_loops_over_both(tmp_path: Path) -> None:
    given = {
        "learning_rate": 5e-5,
        "logging_nan_inf_filter": True,
        "gradient_accumulation_steps": 8,
        "seed": 7,
    }
    args = trainer_arguments(
        job(given), tmp_path, precision=Precision("float32"), hardware=CPU, held_out=False
    )
    assert (args.learning_rate, args.seed, args.max_grad_norm) == (5e-5, 7, DEFAULTS["max_grad_norm"])
    assert not args.logging_nan_inf_filter
    assert args.gradient_accumulation_steps == 1
    assert args.report_to in ([], ["none"])


@pytest.mark.parametrize(
    ("held_out_tokens", "max_steps", "expected"),
    [(100, -1, 8), (4000, -1, 4), (20_000, -1, 0), (100, 5, 2), (100, 1, 0)],
    ids=["cheap", "costly", "too costly", "few steps", "one step"],
)
def test_the_held_out_loss_is_measured_during_training_as_often_as_is_cheap(
    held_out_tokens: int, max_steps: int, expected: int, tmp_path: Path
) -> None:
    given = job({"max_steps": max_steps})
    made = plan(given, 400, length=100)  # three epochs: 120,000 tokens, forward and twice as much backward
    args = trainer_arguments(given, tmp_path, precision=Precision("float32"), hardware=CPU, held_out=True)
    schedule_evaluations(args, made, held_out_tokens=held_out_tokens)
    steps = max_steps if max_steps > 0 else 3 * made.steps_per_epoch
    at = range(int(args.eval_steps), steps, int(args.eval_steps)) if args.eval_strategy == "steps" else ()
    assert len(at) == expected


def test_evaluation_without_held_out_rows_is_switched_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = trainer_arguments(
        job({"eval_strategy": "epoch"}),
        tmp_path,
        precision=Precision("float32"),
        hardware=CPU,
        held_out=False,
    )
    assert args.eval_strategy == "no"
    assert "no rows are held out" in caplog.text
