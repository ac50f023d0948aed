"""Step 4: QLoRA on Phi-3-mini's shape, row lengths as people's are, in passes of several sizes.

The trainer's own steps on a model that is read and quantised as a job's is; the peak beside what the plan
says; one step under the profiler. TRL, where it is installed, trains on the same rows. Start at `run`.
"""

import itertools
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from runtime import hardware, models
from runtime.model_source import ModelSource, Quantization
from runtime.tuning import fit
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence, TokenizedSplit
from runtime.tuning.identity import JobIdentity
from runtime.tuning.precision import resolve_precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.settings import Output, TuningJob
from runtime.tuning.train import setup
from runtime.tuning.train.progress import JobProgress
from tests.bench.gpu.models import SHAPES, saved
from tests.bench.gpu.step import Context, Figures, NotHereError, cudnn_attention
from tests.bench.gpu.traces import Trace, read

PASSES = {"phi-3-mini": (2048, 16384, 32768), "tiny": (256, 512)}
"""Of a small GPU, of the most that the plan takes, and of more, which should gain nothing."""
TRL_TOKENS = {"phi-3-mini": 8192, "tiny": 512}
"""Of a pass: more do not fit without checkpointing."""
ROW_TOKENS = {"phi-3-mini": (300, 2048), "tiny": (40, 160)}
"""Median and maximum."""
SPREAD = 0.8
"""Of the lognormal distribution of lengths."""
STEPS, WARM = 10, 2
TINY_STEPS = 4


class StepClock(TrainerCallback):
    """Notes when each step ended and how many tokens it had, and profiles the last one."""

    def __init__(self, context: Context, *, steps: int, tokens: Any) -> None:
        self.context, self.steps, self.tokens = context, steps, tokens
        self.times: list[tuple[float, int]] = []
        self.trace: Trace | None = None
        self._profile: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.steps - 1:
            gpu = self.context.device == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.context.synchronize()
        if self._profile is None:
            self.times.append((time.monotonic(), self.tokens()))
        else:
            self._profile.stop()
            self.trace = read(self._profile, gpu=self.context.device == "cuda")

    def figures(self) -> Figures:
        """Return the speed once the first steps are done, and what the profiler saw."""
        (began, before), (ended, after) = self.times[WARM - 1], self.times[-1]
        steps = len(self.times) - WARM
        found: Figures = {
            "tokens_per_s": (after - before) / (ended - began),
            "ms_per_step": 1000 * (ended - began) / steps,
            "tokens_per_step": (after - before) / steps,
        }
        if self.trace is not None:
            found |= {
                "launches": self.trace.launches,
                "busy_share": self.trace.busy_share,
                "host_waits": sum(self.trace.waits.values()),
                "host_reads": self.trace.reads,
                "waits": self.trace.waits,
                "asked": self.trace.asked,
                "kernels": self.trace.kernels,
            }
        return found


def run(context: Context) -> None:
    """Train in passes of each size."""
    context.case("model on disk", lambda: {"folder": saved(context).name})
    roof = roofline_tokens_per_s(context)
    for tokens in PASSES[context.shape]:
        context.case(f"passes of {tokens}", partial(_ours, context, tokens, roof), needs_s=10)
    most = TRL_TOKENS[context.shape]
    context.case(f"TRL, passes of {most}", lambda: _trl(context, most, roof), needs_s=15)


def roofline_tokens_per_s(context: Context) -> float:
    """Return tokens a second at the rate of a large product: forward, and backward through frozen weights.

    2 operations per weight and token forward and 2 backward, without those of attention and adapter.
    """
    size = SHAPES[context.shape]
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    weights = size["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)
    return context.matmul_tflop_per_s(context.dtype) * 1e12 / (4 * weights)


def _rows(context: Context, tokens: int) -> tuple[tuple[TokenizedSequence, ...], int]:
    """Return rows for all steps, and how many of them a step of one pass has."""
    median, longest = ROW_TOKENS[context.shape]
    draw = np.random.default_rng(tokens)
    mean = median * np.exp(SPREAD**2 / 2)
    per_step = max(1, int(0.9 * tokens / mean))
    steps = TINY_STEPS if context.is_tiny else STEPS
    sizes = np.exp(np.log(median) + SPREAD * draw.standard_normal(per_step * steps))
    sizes = np.clip(sizes, 8, min(longest, tokens)).astype(int)
    rows = tuple(
        TokenizedSequence(draw.integers(3, 500, size, dtype=np.int32), np.arange(size) >= size // 2)
        for size in sizes
    )
    return rows, per_step


def _job(
    context: Context, tokens: int, rows: Sequence[TokenizedSequence], per_step: int, out: Path
) -> TuningJob:
    folder = saved(context)
    return TuningJob(
        name="bench",
        model=ModelSource(name=str(folder), path=folder),
        training={
            "max_steps": len(rows) // per_step, "per_device_train_batch_size": per_step,
            "logging_steps": 1000,
        },
        output=Output(folder=out),
        tokens_per_pass=tokens,
        fit="adapt",
        checkpoint_minutes=None,
    )  # fmt: skip


def _ours(context: Context, tokens: int, roof: float) -> Figures:
    machine = context.machine
    rows, per_step = _rows(context, tokens)
    with tempfile.TemporaryDirectory(dir=context.scratch) as out:
        job = _job(context, tokens, rows, per_step, Path(out))
        job, planned_bytes = fit.resolve(job, machine, processes=1, rows=rows)
        job, precision = resolve_precision(job, machine)
        progress = JobProgress()
        rank = setup.RankSetup(machine, hardware.device(machine), precision, Ranks(), StopSignal(), progress)
        context.release()
        began = time.monotonic()
        made = setup.prepare(
            job, models.load_tokenizer(job.model), TokenizedSplit(TokenizedData(rows)), rank=rank
        )
        loaded_s = time.monotonic() - began
        steps = len(rows) // per_step
        clock = StepClock(context, steps=steps, tokens=lambda: progress.throughput.tokens)
        made.trainer.add_callback(clock)
        setup.run_training(made, folder=Path(out) / "checkpoints", owner=JobIdentity({}))
    figures = clock.figures()
    figures["roofline_share"] = figures["tokens_per_s"] / roof
    peak = _peak_bytes(context)
    figures |= {"peak_gib": peak / 2**30, "planned_gib": (planned_bytes or 0) / 2**30}
    figures["load_s"] = loaded_s
    figures["checkpointing"] = job.training.get("gradient_checkpointing")
    del made
    context.release()
    return figures


def _peak_bytes(context: Context) -> int:
    """Return the most that torch reserved and what CUDA took beside it, or what was resident."""
    if context.device == "cpu":
        return hardware.peak_resident_bytes()
    free, total = torch.cuda.mem_get_info()
    return int(torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved())


def _trl(context: Context, tokens: int, roof: float) -> Figures:
    """Train on the same rows by TRL: packed to 2,048 tokens, the same adapter on the same 4-bit weights."""
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise NotHereError(str(error)) from None
    rows, _ = _rows(context, tokens)
    folder = saved(context)
    source = ModelSource(name=str(folder), path=folder)
    machine = context.machine
    width = min(ROW_TOKENS[context.shape][1], tokens)
    steps = TINY_STEPS if context.is_tiny else STEPS
    with tempfile.TemporaryDirectory(dir=context.scratch) as out:
        settings = SFTConfig(
            output_dir=out, max_length=width, packing=True, max_steps=steps, learning_rate=2e-4,
            per_device_train_batch_size=max(1, tokens // width), save_strategy="no", report_to=[],
            use_cpu=context.device == "cpu", bf16=context.dtype == torch.bfloat16,
            fp16=context.dtype == torch.float16, disable_tqdm=True, gradient_checkpointing=False,
            logging_steps=1000, dataset_num_proc=None,
        )  # fmt: skip
        base = models.load(
            source, hardware=machine, device=hardware.device(machine), quantization=Quantization(),
            training=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=base,
            args=settings,
            train_dataset=Dataset.from_list(
                [{"input_ids": row.ids.tolist(), "completion_mask": row.loss_mask.astype(int).tolist()}
                 for row in itertools.chain(rows, rows)]
            ),
            processing_class=models.load_tokenizer(source),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        seen = _count_tokens(trainer)
        clock = StepClock(context, steps=steps, tokens=lambda: seen[0])
        trainer.add_callback(clock)
        with cudnn_attention():  # TRL's own process has not disabled it
            trainer.train()
    figures = clock.figures()
    figures["roofline_share"] = figures["tokens_per_s"] / roof
    figures["peak_gib"] = _peak_bytes(context) / 2**30
    context.release()
    return figures


def _count_tokens(trainer: Any) -> list[int]:
    """Return a counter of the tokens that `trainer` runs, padding not counted."""
    seen = [0]
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        seen[0] += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return compute(model, inputs, *arguments, **named)

    trainer.compute_loss = compute_loss
    return seen
