"""Jobs are refused or adapted by the memory plan, and the plan is what a process really takes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import CapacityError, ConfigError
from runtime.hardware import Hardware
from runtime.memory import tuning
from runtime.model_source import ModelSource
from runtime.tuning import fit
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import DataSource, Encoding, Output, TuningJob
from runtime.tuning.train.schedule import batch_plan

V100 = Hardware("cuda", "V100", (7, 0), 16160 << 20, 1)


def job(training: dict[str, Any] | None = None, **settings: Any) -> TuningJob:
    model = ModelSource(name="phi-3-mini-128k-instruct", repository="microsoft/Phi-3-mini-128k-instruct")
    return TuningJob(**{"name": "j", "model": model, "training": training or {}, **settings})


def cpu(gib: float) -> Hardware:
    return Hardware("cpu", "CPU", None, int(gib * 2**30), 1)


def test_layers_are_computed_again_only_where_that_is_needed() -> None:
    a100 = Hardware("cuda", "A100", (8, 0), 80 << 30, 1)
    long = job(encoding=Encoding(max_tokens=4096))
    assert not fit.plan(long, a100).forecast.run.checkpointing
    assert fit.plan(long, V100).forecast.run.checkpointing


def test_the_users_settings_stay_unless_fit_is_requested() -> None:
    stubborn = {"gradient_checkpointing": False, "per_device_train_batch_size": 8}
    with pytest.raises(CapacityError, match=r"needs [\d.]+ GiB .*--fit adapts") as refused:
        fit.check(job(stubborn), V100)
    assert "\n" not in str(refused.value)
    fit.check(job(stubborn, fit="adapt"), V100)
    rows = [TokenizedSequence(np.ones(2048, dtype=np.int32), np.ones(2048, dtype=np.bool_))]
    settled, planned = fit.resolve(job(stubborn, fit="adapt"), V100, processes=1, rows=rows)
    assert planned == fit.plan(settled, V100, rows=rows).forecast.total_bytes
    assert settled.tokens_per_pass is not None
    assert 2048 <= settled.tokens_per_pass <= 8 * 2048
    assert fit.plan(settled, V100, rows=rows).forecast.fits


H200 = Hardware("cuda", "H200", (9, 0), 139 << 30, 1)


@pytest.mark.parametrize(
    ("training", "settings", "tokens", "why"),
    [
        ({}, {}, 16_384, "more gain nothing"),
        ({"per_device_train_batch_size": 4}, {}, 8192, "as requested"),
        ({"per_device_train_batch_size": 4}, {"fit": "adapt"}, 8192, "as requested"),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}, {"fit": "adapt"},
            12_288, "the rows of a step",
        ),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}, {}, 2048, "one row"),
        ({}, {"tokens_per_pass": 4096}, 4096, "as requested"),
    ],
)  # fmt: skip
def test_passes_are_as_large_as_gains_on_a_gpu_with_room(
    training: dict[str, Any], settings: dict[str, Any], tokens: int, why: str
) -> None:
    planned = fit.plan(job(training, **settings), H200)
    assert (planned.forecast.run.tokens, planned.pass_size) == (tokens, why)
    assert f"passes of {tokens} tokens ({why})" in planned.summary


def test_a_small_gpus_pass_holds_what_fits_and_a_cpus_what_is_asked() -> None:
    small = fit.plan(job(), V100)
    assert 2048 < small.forecast.run.tokens < 16_384
    assert small.pass_size == "as many as fit"
    assert fit.plan(job(encoding=Encoding(max_tokens=512)), cpu(64)).forecast.run.tokens == 1024


@pytest.mark.parametrize("processes", [1, 2])
def test_the_pass_size_divides_steps_and_changes_none(processes: int) -> None:
    draw = np.random.default_rng(0)
    rows = tuple(
        TokenizedSequence(np.ones(size, dtype=np.int32), np.ones(size, dtype=np.bool_))
        for size in draw.integers(100, 2048, 900)
    )
    settled, _ = fit.resolve(job(), replace(H200, count=processes), processes=processes, rows=rows)
    ranks = Ranks(world_size=processes)
    plans = [
        batch_plan(each, TokenizedData(rows), layout="packed", ranks=ranks, hardware=H200)
        for each in (job(), settled)
    ]
    small, large = [[plan.rank_batch(step, 0) for step in plan.steps(0)] for plan in plans]
    assert list(plans[0].steps(0)) == list(plans[1].steps(0))
    for before, after in zip(small, large, strict=True):
        assert before.labelled_tokens == after.labelled_tokens
        rows_of = [sorted(row for rows in each.micro_batches for row in rows) for each in (before, after)]
        assert rows_of[0] == rows_of[1]
    assert sum(len(each.micro_batches) for each in large) < sum(len(each.micro_batches) for each in small) / 3
    assert plans[1].budget_tokens <= 16_384


@pytest.mark.parametrize(
    "machine", [V100, Hardware("cuda", "A100", (8, 0), 80 << 30, 1)], ids=["V100", "A100"]
)
def test_a_model_that_overflows_float16_is_refused_before_anything_is_read(
    machine: Hardware, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    half = job({"fp16": True}, model=ModelSource(name="m", path=tmp_path))
    for ask in (fit.check, fit.plan):
        with pytest.raises(ConfigError, match="activations of gemma3_text models exceed 65504") as refused:
            ask(half, machine)
    advice = "float32 (--set model.dtype=float32 --set training.fp16=false)"
    assert (advice in str(refused.value)) == (machine is V100)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", **sizes}))
    whole = job(model=ModelSource(name="m", path=tmp_path, dtype="float32"))
    fit.check(whole, machine)


def test_a_model_that_transformers_does_not_build_is_refused_before_data_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ConfigError, match="transformers builds no model of this configuration"):
        fit.check(job(model=ModelSource(name="m", path=tmp_path)), V100)
    fit.check(job(model=ModelSource(name="m", path=tmp_path, trust_remote_code=True)), V100)


def test_gpus_without_bfloat16_are_not_proposed_to_models_that_overflow_float16() -> None:
    planned = fit.plan(job(), Hardware("cuda", "A100", (8, 0), 80 << 30, 1))
    assert "V100-16GB" in fit.gpus_that_fit(planned.shape, planned.requested, planned.adjustable)
    gemma = replace(planned.shape, model_type="gemma3_text")
    assert fit.gpus_that_fit(gemma, planned.requested, planned.adjustable)[0] == "A10-24GB"


def test_rows_are_cut_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    long = Encoding(max_tokens=100_000)
    with pytest.raises(CapacityError, match=r"max_length \d+ with --fit would fit|larger GPU"):
        fit.check(job(encoding=long, fit="adapt"), V100)
    cut = fit.shorten(job(encoding=long, fit="shorten"), V100, processes=1)
    assert cut.encoding.max_tokens is not None
    assert 1000 < cut.encoding.max_tokens < 100_000
    assert "rows are cut at" in caplog.text
    assert fit.shorten(job(encoding=long), V100, processes=1).encoding.max_tokens == 100_000


def test_a_cpus_memory_is_planned_with_too() -> None:
    with pytest.raises(CapacityError, match=r"on CPU \(1\.9 GiB usable\).*GiB of memory would do"):
        fit.check(job(), cpu(2))
    assert fit.plan(job(), cpu(64)).forecast.fits


def test_rows_known_to_be_short_and_mostly_prompt_need_less() -> None:
    loss_mask = np.arange(100) >= 90
    rows = [TokenizedSequence(np.ones(100, dtype=np.int32), loss_mask)] * 4
    known, unknown = fit.plan(job(), V100, rows=rows), fit.plan(job(), V100)
    assert known.requested.row_tokens == 100
    assert known.requested.labelled_share == pytest.approx(0.1)
    assert known.forecast.total_bytes < unknown.forecast.total_bytes


def write_small_model(folder: Path) -> None:
    """Save a random Llama whose activations outweigh the process: 6 layers, hidden 256."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import write_tiny_tokenizer

    write_tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))


def measured(job: TuningJob, script: str) -> tuple[int, fit.MemoryPlan]:
    """Return the peak resident bytes of a worker after two steps, and its plan."""
    path = job.output.folder / "job.json"
    job.output.folder.mkdir(parents=True)
    path.write_text(job.model_dump_json())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((job.output.folder / "tuning_report.json").read_text())
    limit = job.encoding.max_tokens or 0
    rows = [TokenizedSequence(np.ones(limit, dtype=np.int32), np.ones(limit, dtype=np.bool_))]
    return int(report["result"]["peak_memory_bytes"]), fit.plan(job, cpu(64), rows=rows)


WORKER = "import sys; from runtime.tuning.__main__ import main; sys.exit(main(sys.argv[1:]))"
COMPACT = f"from runtime import hardware; hardware.return_freed_memory(); {WORKER}"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["default", "compact", "checkpointing"])
def test_the_plan_is_the_measured_peak_of_a_small_model(
    how: str, tmp_path: Path, make_long_job: Callable[..., TuningJob]
) -> None:
    write_small_model(tmp_path / "model")
    again = how == "checkpointing"
    training = {"gradient_checkpointing": again}
    made = make_long_job(ModelSource(name="small", path=tmp_path / "model"), 4096, training)
    _hold(made, how)


@pytest.mark.slow
@pytest.mark.model
def test_the_plan_is_the_measured_peak_of_the_demo_model(
    demo_model_dir: Path, make_long_job: Callable[..., TuningJob]
) -> None:
    _hold(make_long_job(ModelSource(name="demo", path=demo_model_dir), 512, {}), "default")


def _hold(made: TuningJob, how: str) -> None:
    from dataclasses import replace

    compact = how != "default"
    peak, plan = measured(made, COMPACT if compact else WORKER)
    run = replace(plan.requested, compact=compact)
    planned = tuning.resident(tuning.parts(plan.shape, run))
    assert planned == pytest.approx(peak, rel=0.2), f"planned {planned >> 20} MiB, measured {peak >> 20} MiB"


@pytest.fixture
def make_long_job(tmp_path: Path) -> Callable[..., TuningJob]:
    """Return a maker of jobs whose rows are all cut at the same length, one to a pass, all of it labelled."""

    def make(model: ModelSource, tokens: int, training: dict[str, Any]) -> TuningJob:
        lines = [
            json.dumps({"text": f"word{number} the quick brown fox answers " * 2000}) for number in range(3)
        ]
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "rows.jsonl").write_text("\n".join(lines))
        return TuningJob(
            name="long",
            model=model,
            data=DataSource(folder=tmp_path / "rows", train_share=1.0),
            encoding=Encoding(max_tokens=tokens, loss_on="all"),
            training={"max_steps": 2, "per_device_train_batch_size": 1, **training},
            tokens_per_pass=tokens,
            output=Output(folder=tmp_path / "out"),
            checkpoint_minutes=None,
        )

    return make
