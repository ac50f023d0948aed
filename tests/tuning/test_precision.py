"""The type that a job computes in; float16 as on a V100: the real scaler, autocast, Trainer, on a CPU."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.errors import DivergedError, exit_code
from runtime.hardware import Hardware
from runtime.model_source import ModelSource
from runtime.tuning.identity import JobIdentity
from runtime.tuning.output import OutputPaths
from runtime.tuning.precision import resolve_precision
from runtime.tuning.settings import Lora, TuningJob
from runtime.tuning.train.callbacks import MAX_SKIPPED_STEPS
from runtime.tuning.train.setup import TrainingSetup, run_training
from tests.tuning.train.test_trainer import training_setup

Maker = Callable[..., TuningJob]

V100 = Hardware("cuda", "Tesla V100", (7, 0), 16 << 30, 1)
A100 = Hardware("cuda", "A100", (8, 0), 80 << 30, 1)
CPU = Hardware("cpu", "test", None, 8 << 30, 1)


@pytest.mark.parametrize(
    ("hardware", "training", "wanted", "chosen"),
    [
        (V100, {}, "bfloat16", "float16"),
        (V100, {"bf16": True}, "auto", "float16"),
        (V100, {}, "float32", "float32"),
        (A100, {}, "auto", "bfloat16"),
        (A100, {"fp16": True}, "auto", "float16"),
        (CPU, {}, "bfloat16", "float32"),
        (CPU, {"fp16": True}, "auto", "float32"),
    ],
)
def test_fault_28_type_follows_the_hardware_and_is_logged(
    hardware: Hardware, training: dict[str, Any], wanted: Any, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelSource(name="m", dtype=wanted)
    job, precision = resolve_precision(TuningJob(name="j", model=model, training=training), hardware)
    assert (precision.dtype, job.model.dtype, job.quantization and job.quantization.compute_dtype) == (
        chosen,
    ) * 3
    assert (precision.fp16, precision.bf16) == (chosen == "float16", chosen == "bfloat16")
    changed = chosen not in (wanted, "bfloat16" if training.get("bf16") else "float16" if training else "")
    assert bool(caplog.records) == (changed and (wanted != "auto" or bool(training)))


class Types(TorchDispatchMode):
    """Notes the type of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.seen.add(each.dtype)
        return out


RISING = {"warmup_steps": 1}
"""Without a warm-up the gradients of the tiny model soon grow beyond the first scale."""


def float16_setup(job: TuningJob, *, scale: float = 2.0**16) -> TrainingSetup:
    """Set `job` up as a V100 would compute it; accelerate has its scaler on a CPU only when handed one."""
    setup = training_setup(job, V100)
    accelerator = setup.trainer.accelerator
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
    return setup


@pytest.fixture
def types() -> Iterator[set[torch.dtype]]:
    with Types() as mode:
        yield mode.seen


def train(setup: TrainingSetup) -> None:
    run_training(setup, folder=Path(setup.trainer.args.output_dir or ""), owner=JobIdentity({}))


def losses(setup: TrainingSetup) -> list[float]:
    return [entry["loss"] for entry in setup.trainer.state.log_history if "loss" in entry]


def scaler_of(setup: TrainingSetup) -> torch.amp.GradScaler:
    scaler = setup.trainer.accelerator.scaler
    assert isinstance(scaler, torch.amp.GradScaler)
    return scaler


def adapter(setup: TrainingSetup) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in setup.model.named_parameters() if p.requires_grad}


def break_gradients(setup: TrainingSetup) -> None:
    broken = next(p for p in setup.model.parameters() if p.requires_grad)
    broken.register_hook(lambda gradient: gradient * torch.nan)


def test_fault_28_a_v100_learns_in_float16_with_float32_adapters_and_no_bfloat16(
    make_job: Maker, types: set[torch.dtype]
) -> None:
    setup = float16_setup(make_job(training={"max_steps": 12, "bf16": True, **RISING}))
    train(setup)
    assert torch.float16 in types
    assert torch.bfloat16 not in types
    assert {weight.dtype for weight in adapter(setup).values()} == {torch.float32}
    assert scaler_of(setup).state_dict()["_growth_tracker"] == 12, "steps that were scaled and taken"
    assert losses(setup)[-1] < losses(setup)[0] - 0.1


def test_losses_in_float16_are_those_in_float32(make_job: Maker) -> None:
    same = {
        "training": {"max_steps": 6, "learning_rate": 1e-3, **RISING},
        "lora": Lora(r=4, alpha=8, dropout=0.0),
    }
    half = float16_setup(make_job("half", **same))
    whole = training_setup(make_job("whole", **same))
    for setup in (half, whole):
        train(setup)
    assert losses(half) == pytest.approx(losses(whole), rel=2e-3)


def test_a_scale_that_is_too_large_costs_steps_and_no_weights(make_job: Maker) -> None:
    setup = float16_setup(make_job(training={"max_steps": 30, **RISING}), scale=2.0**30)
    train(setup)
    assert 1 < scaler_of(setup).get_scale() < 2.0**28
    assert all(weight.isfinite().all() for weight in adapter(setup).values())
    assert losses(setup)[-1] < losses(setup)[0] - 0.1


@pytest.mark.parametrize(("steps", "endured"), [(60, MAX_SKIPPED_STEPS), (5, 5)])
def test_fault_25_gradients_that_no_scale_helps_end_the_job(
    make_job: Maker, steps: int, endured: int
) -> None:
    setup = float16_setup(make_job(training={"max_steps": steps, **RISING}))
    first = adapter(setup)
    break_gradients(setup)
    with pytest.raises(DivergedError, match=f"{endured} steps in a row") as caught:
        train(setup)
    assert exit_code(caught.value) == 4
    assert setup.trainer.state.global_step in {endured - 1, endured}
    torch.testing.assert_close(adapter(setup), first, rtol=0, atol=0)


def test_a_resumed_job_whose_last_steps_are_skipped_ends_as_one_without_a_break(make_job: Maker) -> None:
    job = make_job(training={"max_steps": 12, "save_strategy": "steps", "save_steps": 8, **RISING})
    train(float16_setup(job))
    shutil.rmtree(OutputPaths(job.output.folder).checkpoints / "checkpoint-12")
    resumed = float16_setup(job)
    break_gradients(resumed)
    train(resumed)
    assert resumed.trainer.state.global_step == 12
    assert scaler_of(resumed).get_scale() == 2.0**12, "four steps were skipped"


def test_a_resumed_job_goes_on_with_the_scale_it_had(make_job: Maker) -> None:
    training = {"max_steps": 12, "save_strategy": "steps", "save_steps": 8, **RISING}
    job = make_job(training=training)
    whole = float16_setup(job, scale=2.0**24)
    train(whole)
    shutil.rmtree(OutputPaths(job.output.folder).checkpoints / "checkpoint-12")
    resumed = float16_setup(job)
    train(resumed)
    assert resumed.trainer.state.global_step == 12
    assert scaler_of(resumed).get_scale() == scaler_of(whole).get_scale() != 2.0**16
    torch.testing.assert_close(adapter(resumed), adapter(whole), rtol=0, atol=0)
