"""The model with its adapter and its trainer: set up, and trained to the end.

Does not know data files, reports or registries. Start at `prepare`, then `run_training`.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError

from runtime import models
from runtime.errors import StoppedError
from runtime.hardware import Hardware
from runtime.tuning.data.batching import BatchPlan
from runtime.tuning.data.tokenize import TokenizedSplit
from runtime.tuning.identity import JobIdentity
from runtime.tuning.model import fsdp, fused_ops, lora, lora_init, packed_attention, padded_attention
from runtime.tuning.output import OutputPaths
from runtime.tuning.precision import Precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.settings import TuningJob
from runtime.tuning.train import checkpoint_sync, checkpoints
from runtime.tuning.train.progress import JobProgress, MetricsHistory, Reporter, Throughput
from runtime.tuning.train.schedule import (
    batch_plan,
    best_metric,
    choose_layout,
    chooses_evaluations,
    requested_checkpointing,
    schedule_evaluations,
    settle_steps,
    trainer_arguments,
)
from runtime.tuning.train.terminal_bar import TerminalBar

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from runtime.tuning.train.best import BestWeights
    from runtime.tuning.train.callbacks import CheckpointCallback
    from runtime.tuning.train.trainer import AdapterTrainer

log = logging.getLogger(__name__)

Curve = tuple[tuple[float, float], ...]
"""(step, loss) of each measurement."""


@dataclass(frozen=True, slots=True)
class RankSetup:
    """One rank of a job: its hardware, its peers, the signal that stops it, and its progress."""

    machine: Hardware
    device: str
    precision: Precision
    ranks: Ranks
    stop: StopSignal
    progress: JobProgress


@dataclass(frozen=True, slots=True)
class AdapterModel:
    """A base model with a new adapter."""

    model: "PeftModel"
    first_weights: "dict[str, torch.Tensor] | None"
    """The adapter's weights before training, where model/lora_init.py changed the base."""

    @property
    def model_type(self) -> str:
        return str(cast("PreTrainedModel", self.model.get_base_model()).config.model_type)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What runs between two steps of a trainer."""

    checkpoint: "CheckpointCallback"
    best: "BestWeights | None"
    """Where the job keeps the step with the lowest held-out loss."""
    reporter: Reporter
    all: "list[TrainerCallback]"


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """Everything that training needs, and that the job's other steps read."""

    adapter: AdapterModel
    tokenizer: "PreTrainedTokenizerBase"
    trainer: "AdapterTrainer"
    callbacks: Callbacks
    rank: RankSetup

    @property
    def model(self) -> "PeftModel":
        return self.adapter.model

    @property
    def throughput(self) -> Throughput:
        return self.rank.progress.throughput

    @property
    def recent_loss(self) -> float | None:
        """Mean of the losses logged in the last epoch."""
        recent = [loss for _, loss in self.logged("loss")][-self.trainer.plan.steps_per_epoch :]
        return sum(recent) / len(recent) if recent else None

    def logged(self, name: str) -> Curve:
        """Return (step, value) of every time that the trainer logged `name`, before a resume too."""
        return tuple(
            (entry["step"], entry[name]) for entry in self.trainer.state.log_history if name in entry
        )

    @property
    def kept_step(self) -> int:
        """Step whose weights are the result: the last one, unless the job keeps the best."""
        best = self.callbacks.best
        return (best.step if best else 0) or self.trainer.state.global_step

    def held_out_curve(self, before: float | None, after: float | None) -> Curve:
        """Return (step, loss) of the held-out rows, from `before` training on; `after` is the kept step's."""
        if before is None or after is None:
            return ()
        last = self.trainer.state.global_step
        measured = {step: loss for step, loss in self.logged("eval_loss") if 0 < step <= last}
        return ((0, before), *sorted({**measured, self.kept_step: after}.items()))


def prepare(
    job: TuningJob, tokenizer: "PreTrainedTokenizerBase", data: TokenizedSplit, *, rank: RankSetup
) -> TrainingSetup:
    """Load the model, attach the adapter, and set up the trainer with its callbacks."""
    from runtime.tuning.train.trainer import AdapterTrainer, Workload

    args, plan = _schedule(job, data, rank)
    adapter = _load(job, rank, seed=args.seed)
    # An aLoRA adapter begins at the last of its tokens in a row: rows stay apart.
    batching = "sorted" if job.lora.options.get("alora_invocation_tokens") else job.encoding.batching
    plan = replace(plan, layout=choose_layout(batching, adapter.model_type))
    log.info(
        "%d steps an epoch of %d rows, %s in passes of at most %d tokens",
        plan.steps_per_epoch, plan.rows_per_step, plan.layout, plan.budget_tokens,
    )  # fmt: skip
    if data.held_out is not None and chooses_evaluations(job):
        searches = best_metric(job) is not None
        schedule_evaluations(args, plan, held_out_tokens=data.held_out.tokens, searches=searches)
    callbacks = _callbacks(job, rank, adapter.model)
    held_out = data.held_out.sequences if data.held_out else ()
    trainer = AdapterTrainer(
        adapter.model,
        args,
        workload=Workload(
            data.train.sequences,
            held_out,
            plan,
            rank.ranks,
            tokenizer.pad_token_id or 0,
            partial(callbacks.reporter.show_activity, "evaluating"),
        ),
        throughput=rank.progress.throughput,
        callbacks=callbacks.all,
    )
    return TrainingSetup(adapter, tokenizer, trainer, callbacks, rank)


def _schedule(job: TuningJob, data: TokenizedSplit, rank: RankSetup) -> "tuple[TrainingArguments, BatchPlan]":
    """Return Trainer's arguments, and the plan of all but the layout, which depends on the model."""
    args = trainer_arguments(
        job,
        OutputPaths(job.output.folder).checkpoints,
        precision=rank.precision,
        hardware=rank.machine,
        held_out=data.held_out is not None,
    )
    plan = batch_plan(job, data.train, layout="sorted", ranks=rank.ranks, hardware=rank.machine)
    settle_steps(args, job, plan)
    return args, plan


def _load(job: TuningJob, rank: RankSetup, *, seed: int) -> AdapterModel:
    """Load the base model and attach a new adapter, initialised from `seed`."""
    from transformers import set_seed

    sharded = job.parallel == "fsdp" and rank.ranks.world_size > 1
    # A model that is sharded because it is too large for one GPU is read to the CPU and moved by layers.
    device = "cpu" if sharded else rank.device
    base = models.load(
        job.model, hardware=rank.machine, device=device, quantization=job.quantization, training=True
    )
    set_seed(seed)
    model = lora.attach(base, job.lora, checkpointing=bool(requested_checkpointing(job)))
    first_weights = lora_init.initialise(model, job.lora, models.locate(job.model))
    if sharded:
        fsdp.shard(model, world=rank.ranks.world_size, device=rank.device)
    return AdapterModel(model, first_weights)


def _callbacks(job: TuningJob, rank: RankSetup, model: "PeftModel") -> Callbacks:
    from runtime.tuning.train.best import BestWeights
    from runtime.tuning.train.callbacks import CheckpointCallback, LossScaleCallback, ProgressCallback

    ranks, throughput = rank.ranks, rank.progress.throughput
    throughput.world_size = ranks.world_size
    keep = job.training.get("save_total_limit", 2)
    checkpoint = CheckpointCallback(ranks, rank.stop, minutes=job.checkpoint_minutes, keep=keep)
    reporter = Reporter(throughput)
    metric = best_metric(job)
    best = BestWeights(model, ranks, metric=metric) if metric else None
    callbacks: list[TrainerCallback] = [LossScaleCallback(), *([best] if best else []), checkpoint]
    if ranks.is_main:
        paths = OutputPaths(job.output.folder)
        paths.make_work()
        reporter.history = MetricsHistory(paths.history)
        reporter.display = TerminalBar() if sys.stderr.isatty() else None
        callbacks.append(ProgressCallback(throughput, reporter))
    return Callbacks(checkpoint, best, reporter, callbacks)


def run_training(setup: TrainingSetup, *, folder: Path, owner: JobIdentity) -> None:
    """Train to the end, from the newest complete checkpoint below `folder` of the job `owner`.

    Raises StoppedError after SIGTERM and a checkpoint.
    """
    checkpoint = _find_checkpoint(setup, folder, owner)
    try:
        with (
            setup.rank.stop.deferred(),
            training_attention(setup),
            fused_ops.fused_rotary(setup.model),
            contextlib.closing(setup.callbacks.reporter),
        ):
            setup.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            _keep_best(setup)
    except (OSError, RuntimeError, SafetensorError):  # a full disk, among others: free space to record why
        if setup.rank.ranks.is_main:
            checkpoints.remove_unsealed(folder)
        raise
    if setup.callbacks.checkpoint.stopped:
        step = setup.trainer.state.global_step
        raise StoppedError(
            f"stopped after step {step} with a checkpoint; run the same command again to resume"
        )


def _find_checkpoint(setup: TrainingSetup, folder: Path, owner: JobIdentity) -> Path | None:
    """Return the checkpoint to resume from, once every node has it; other jobs' are moved out of the way."""
    ranks, registry = setup.rank.ranks, setup.callbacks.checkpoint.registry
    with ranks.together():
        if ranks.is_main:
            history = setup.callbacks.reporter.history
            checkpoints.claim(folder, owner, history=history.path if history else None)
            if registry is not None:
                registry.restore(folder, owner)
    if ranks.is_local_main and not ranks.is_main:  # a disk of its own; a shared one is rank 0's already
        checkpoints.claim(folder, owner)
    checkpoint = checkpoint_sync.sync_newest(folder, ranks)
    if checkpoint:
        log.info("resuming from %s", checkpoint.name)
        if setup.callbacks.best is not None:
            setup.callbacks.best.read(checkpoint)
    return checkpoint


def _keep_best(setup: TrainingSetup) -> None:
    """Where the job asks for it, give the model the weights of the step with the lowest held-out loss."""
    best, trainer = setup.callbacks.best, setup.trainer
    if best is None or setup.callbacks.checkpoint.stopped:
        return
    last = trainer.state.global_step
    if all(step != last for step, _ in setup.logged("eval_loss")):
        trainer.evaluate()
    best.restore()
    losses = setup.logged("eval_loss")
    log.info(
        "kept step %d of %d: %s %.4f is the lowest of %d evaluations",
        setup.kept_step, last, best.metric.removeprefix("eval_"), best.value, len(losses),
    )  # fmt: skip


@contextlib.contextmanager
def training_attention(setup: TrainingSetup) -> Iterator[None]:
    """Within: attention stays inside each document of a packed row. Afterwards: as the model was loaded."""
    if setup.trainer.plan.layout != "packed":
        # a CPU has nothing to wait for, and is faster without a mask
        with padded_attention.with_masks() if setup.rank.device != "cpu" else contextlib.nullcontext():
            yield
        return
    model = cast("PreTrainedModel", setup.model.get_base_model())
    packed_attention.register()
    model.set_attn_implementation(packed_attention.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
