"""A step: what it reads from the device, when memory runs out, when a number is not finite."""

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from runtime import models
from runtime.errors import CapacityError, ConfigError, DivergedError, exit_code
from runtime.hardware import Hardware
from runtime.model_source import ModelSource, Quantization
from runtime.tuning.data import dataset, tokenize
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence, TokenizedSplit
from runtime.tuning.precision import resolve_precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.settings import Encoding, Lora, TuningJob
from runtime.tuning.train.progress import JobProgress
from runtime.tuning.train.setup import RankSetup, TrainingSetup, prepare, training_attention
from tests.families import config_of
from tests.host_reads import HostReads
from tests.serving.engine.models import longrope_model
from tests.tuning.conftest import Worker

Maker = Callable[..., TuningJob]

CPU = Hardware("cpu", "test", None, 8 << 30, 1)

WIDE = {"per_device_train_batch_size": 16, "max_steps": 6}
"""Some 1,400 tokens a step, in passes of at most 1,024."""


def training_setup(
    job: TuningJob, machine: Hardware = CPU, *, held_out: tuple[TokenizedSequence, ...] = ()
) -> TrainingSetup:
    """Set a job's model and trainer up in this process, on its CPU, as for `machine`."""
    tokenizer = models.load_tokenizer(job.model)
    rows = tokenize.encode(
        dataset.load(job.data, []).examples,
        tokenize.Encoder(tokenizer, job.encoding, max_tokens=256),
        BadRows(),
    )
    settled, precision = resolve_precision(job, machine)
    rank = RankSetup(machine, "cpu", precision, Ranks(), StopSignal(), JobProgress())
    apart = TokenizedData(held_out) if held_out else None
    return prepare(settled, tokenizer, TokenizedSplit(rows, apart), rank=rank)


def on_meta(setup: TrainingSetup) -> TrainingSetup:
    """Move a job to torch's meta device, which stands in for a GPU."""
    setup.model.to("meta")
    vars(setup.trainer.args)["_setup_devices"] = torch.device("meta")
    setup.trainer.accelerator.device_placement = False
    return replace(setup, rank=replace(setup.rank, device="meta"))


READ_PER_STEP = ["(2,) to the host"]
"""The loss and the norm of the gradients together, for the check, the clipping and the log."""


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that the meta device stands in for is of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("family", "batching", "checkpointing"),
    [
        ("llama", "packed", False),
        ("llama", "packed", True),
        ("llama", "sorted", False),
        ("mistral", "packed", True),
        ("phi3", "packed", False),
        ("phi3", "packed", True),
        ("phi3", "sorted", True),
        ("longrope", "packed", False),
        ("qwen2, window in the upper layer", "packed", False),
        ("gemma3_text", "packed", True),
        ("opt", "sorted", False),
    ],
)
def test_a_step_of_several_passes_reads_the_device_once(
    make_job: Maker, tiny_llama_dir: Path, tmp_path: Path, family: str, batching: str, checkpointing: bool
) -> None:
    folder = tmp_path / "model"
    config = longrope_model().config if family == "longrope" else config_of(family)
    config.vocab_size = 512  # the tokenizer's
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(tiny_llama_dir)).save_pretrained(folder)
    job = make_job(
        model=ModelSource(name=family, path=folder),
        method="lora",
        quantization=None,
        encoding=Encoding(batching=batching),
        tokens_per_pass=130,
        training={"max_steps": 3, "gradient_checkpointing": checkpointing},
    )
    setup = on_meta(training_setup(job))
    sizes = run_out_above(setup, 1000)
    reads = HostReads()
    with training_attention(setup), reads:
        setup.trainer.train()
    assert len(sizes) > 6
    assert reads.found == 3 * READ_PER_STEP


class BreakAt(TrainerCallback):
    """Calls `damage` before a step."""

    def __init__(self, step: int, damage: Callable[[], object]) -> None:
        self.step, self.damage = step, damage

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            self.damage()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["the loss", "a gradient"])
def test_fault_25_a_step_that_is_not_finite_ends_the_job_before_a_weight_changes(
    make_job: Maker, what: str, number: float
) -> None:
    setup = training_setup(make_job(training={"max_steps": 3}, tokens_per_pass=150))
    trained = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
    first = next(iter(trained.values()))
    before: dict[str, torch.Tensor] = {}

    def damage() -> None:
        before.update({name: p.detach().clone() for name, p in trained.items()})
        if what == "a gradient":
            first.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), number))
        else:
            norm: Any = setup.model.get_base_model().get_submodule("model.norm")
            norm.weight.data[0] = number

    setup.trainer.add_callback(BreakAt(2, damage))
    with training_attention(setup), pytest.raises(DivergedError) as caught:
        setup.trainer.train()
    assert exit_code(caught.value) == 4
    assert re.match(
        rf"{what} became (nan|inf) at step 2; lower learning_rate \(now 0.01\)", str(caught.value)
    )
    assert before.keys() == trained.keys()
    for name, weights in before.items():
        torch.testing.assert_close(trained[name].detach(), weights, rtol=0, atol=0)


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
    assert caught.value.__context__ is None  # no wall of torch's own frames


def test_auto_find_batch_size_halves_once_and_stays_there(make_job: Maker) -> None:
    setup = training_setup(make_job(training={**WIDE, "auto_find_batch_size": True}))
    sizes = run_out_above(setup, 600)
    with training_attention(setup):
        setup.trainer.train()
    assert setup.trainer.state.global_step == 6
    assert setup.trainer.plan.budget_tokens == 512
    assert len([size for size in sizes if size > 600]) == 1
    assert sum(size for size in sizes if size <= 600) == setup.throughput.tokens  # each row of each step once


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_a_failed_pass_held_is_free_before_the_next(
    kind: type[Exception], text: str, make_job: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = training_setup(make_job(training={**WIDE, "auto_find_batch_size": True}))
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail_once(*_: Any) -> None:
        if not held:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise kind(text)

    setup.model.get_base_model().register_forward_pre_hook(fail_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]() is not None))
    with training_attention(setup):
        setup.trainer.train()
    assert alive == [False]


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


def test_what_a_user_asks_of_the_loss_reaches_it(make_job: Maker) -> None:
    def first_loss(**training: Any) -> float:
        setup = training_setup(make_job(training={"max_steps": 1, "learning_rate": 1e-4, **training}))
        setup.trainer.train()
        return float(setup.logged("loss")[0][1])

    plain = first_loss()
    assert first_loss() == plain
    assert first_loss(label_smoothing_factor=0.5) != plain
    assert first_loss(neftune_noise_alpha=50.0) != plain


def test_tokens_seen_are_those_of_the_rows(make_job: Maker) -> None:
    setup = training_setup(make_job(training={**WIDE, "include_num_input_tokens_seen": "non_padding"}))
    setup.trainer.train()
    plan = setup.trainer.plan
    steps = [*plan.steps(0), *plan.steps(1)][:6]
    expected = sum(plan.lengths[row] for rows in steps for row in rows)
    assert setup.trainer.state.num_input_tokens_seen == expected
    assert setup.logged("num_input_tokens_seen")[-1][1] == expected


@pytest.mark.parametrize("training", [{"optim": "grokadamw"}, {"lr_scheduler_type": "warmup_stable_decay"}])
def test_a_setting_that_only_the_library_refuses_is_named(training: dict[str, Any], make_job: Maker) -> None:
    with pytest.raises(ConfigError, match=f"TrainingArguments: {next(iter(training))} "):
        training_setup(make_job(training=training)).trainer.train()
