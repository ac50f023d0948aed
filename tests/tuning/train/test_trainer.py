"""The step when memory runs out: smaller passes, or a failure that says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime import models
from runtime.errors import CapacityError, exit_code
from runtime.hardware import Hardware
from runtime.model_source import Quantization
from runtime.tuning.data import dataset, tokenize
from runtime.tuning.data.tokenize import TokenizedSplit
from runtime.tuning.precision import resolve_precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.settings import Lora, TuningJob
from runtime.tuning.train.progress import JobProgress
from runtime.tuning.train.setup import RankSetup, TrainingSetup, prepare, training_attention
from tests.tuning.conftest import Worker

Maker = Callable[..., TuningJob]

CPU = Hardware("cpu", "test", None, 8 << 30, 1)

WIDE = {"per_device_train_batch_size": 16, "max_steps": 6}
"""Some 1,400 tokens a step, in passes of at most 1,024."""


def training_setup(job: TuningJob, machine: Hardware = CPU) -> TrainingSetup:
    """Set a job's model and trainer up in this process, on its CPU, as for `machine`."""
    tokenizer = models.load_tokenizer(job.model)
    rows = tokenize.encode(dataset.load(job.data, []).examples, tokenizer, job.encoding, max_tokens=256)
    settled, precision = resolve_precision(job, machine)
    rank = RankSetup(machine, "cpu", precision, Ranks(), StopSignal(), JobProgress())
    return prepare(settled, tokenizer, TokenizedSplit(rows), rank=rank)


def run_out_above(setup: TrainingSetup, tokens: int) -> list[int]:
    """Let every forward pass of more than `tokens` fail as CUDA does; returns the sizes of all passes."""
    sizes: list[int] = []

    def measure(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    setup.model.get_base_model().register_forward_pre_hook(measure, with_kwargs=True)
    return sizes


def test_fault_27_out_of_memory_in_a_step_ends_6_with_advice(make_job: Maker) -> None:
    setup = training_setup(make_job(training=WIDE))
    run_out_above(setup, 600)
    with training_attention(setup), pytest.raises(CapacityError) as caught:
        setup.trainer.train()
    assert exit_code(caught.value) == 6
    assert "out of GPU memory with 1024 tokens in a pass" in str(caught.value)
    assert "lower max_length or per_device_train_batch_size" in str(caught.value)
    assert caught.value.__suppress_context__  # no wall of torch's own frames


def test_auto_find_batch_size_halves_once_and_stays_there(make_job: Maker) -> None:
    setup = training_setup(make_job(training={**WIDE, "auto_find_batch_size": True}))
    sizes = run_out_above(setup, 600)
    with training_attention(setup):
        setup.trainer.train()
    assert setup.trainer.state.global_step == 6
    assert setup.trainer.plan.budget_tokens == 512
    assert len([size for size in sizes if size > 600]) == 1
    assert sum(size for size in sizes if size <= 600) == setup.throughput.tokens  # each row of each step once


def test_auto_find_batch_size_gives_up_at_the_longest_row(make_job: Maker) -> None:
    setup = training_setup(make_job(training={**WIDE, "auto_find_batch_size": True}))
    run_out_above(setup, 20)
    with training_attention(setup), pytest.raises(CapacityError, match="longest row"):
        setup.trainer.train()


@pytest.mark.slow
def test_auto_find_batch_size_of_one_rank_leaves_the_others_and_the_losses_alone(make_job: Maker) -> None:
    training = {"per_device_train_batch_size": 16, "max_steps": 4, "auto_find_batch_size": True}
    same = {
        "training": training,
        "lora": Lora(r=4, alpha=8, dropout=0.0),
    }  # what is dropped follows the passes
    plenty = Worker(make_job("plenty", **same), processes=2)
    assert plenty.wait() == 0, plenty.output()
    short = Worker(make_job("short", **same), processes=2, module="tests.faults.short_of_memory")
    assert short.wait() == 0, short.output()
    assert "out of GPU memory: continuing with" in short.output()
    assert "out of GPU memory" not in plenty.output()
    losses = [{step["step"]: step["loss"] for step in worker.steps()} for worker in (plenty, short)]
    assert sorted(losses[0]) == [1, 2, 3, 4]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"quantization": Quantization(bits=8)},
    ],
    ids=["rslora", "dora", "pissa", "olora", "int8"],
)
def test_variants_of_lora_learn(make_job: Maker, options: dict[str, Any]) -> None:
    method = {"method": "lora", "quantization": None} if "init_lora_weights" in options else {}
    if "quantization" in options:
        method, options = options, {}
    job = make_job(training={"max_steps": 12}, lora=Lora(r=4, alpha=8, options=options), **method)
    setup = training_setup(job)
    with training_attention(setup):
        setup.trainer.train()
    losses = [entry["loss"] for entry in setup.trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
