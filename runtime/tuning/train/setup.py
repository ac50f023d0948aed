"""The model with its adapter and its trainer: set up, measured, trained through.

Does not know data files, reports or registries. Start at `prepare`.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError

from runtime import models
from runtime.errors import StoppedError
from runtime.files import write_atomic
from runtime.hardware import Hardware
from runtime.tuning.data.dataset import Example
from runtime.tuning.data.tokenize import TokenizedData
from runtime.tuning.model import fsdp, fused_ops, lora, lora_init, packed_attention
from runtime.tuning.output import OutputPaths
from runtime.tuning.precision import Precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.report import metrics_server, samples
from runtime.tuning.report.progress import MetricsHistory, Reporter, TerminalBar, Throughput
from runtime.tuning.settings import TuningJob
from runtime.tuning.train import checkpoints
from runtime.tuning.train.arguments import (
    asked_checkpointing,
    choose_layout,
    evaluate_on_the_way,
    make_plan,
    training_arguments,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from runtime.tuning.train.callbacks import CheckpointCallback
    from runtime.tuning.train.trainer import AdapterTrainer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class JobProgress:
    """Where a job is, for the record of a failure and for who watches."""

    meter: Throughput = field(default_factory=Throughput)
    phase: str = "start"

    def state(self, job: TuningJob) -> metrics_server.JobState:
        """Return what can be told about `job` now."""
        stalled = self.phase == "train" and self.meter.stalled
        return metrics_server.JobState(job.name, job.model.name, self.phase, stalled, self.meter.figures())

    def enter(self, phase: str) -> None:
        """Begin `phase`."""
        self.phase = phase
        log.debug("phase %s", phase)


@dataclass(frozen=True, slots=True)
class RankSetup:
    """Where a job runs, and who may stop or watch it."""

    machine: Hardware
    device: str
    precision: Precision
    ranks: Ranks
    stop: StopSignal
    course: JobProgress


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """What training needs and the steps around it share."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    trainer: "AdapterTrainer"
    survival: "CheckpointCallback"
    reporter: Reporter
    setting: RankSetup
    first_weights: "dict[str, torch.Tensor] | None"
    """The adapter's, where the base has lost them to it (starts.py)."""

    @property
    def meter(self) -> Throughput:
        return self.setting.course.meter

    @property
    def recent_loss(self) -> float | None:
        """Mean of the losses logged in the last epoch."""
        recent = [loss for _, loss in self.logged("loss")][-self.trainer.plan.steps_per_epoch :]
        return sum(recent) / len(recent) if recent else None

    def logged(self, name: str) -> tuple[tuple[float, float], ...]:
        """Return (step, value) of every time that the trainer logged `name`, before a resume too."""
        return tuple(
            (entry["step"], entry[name]) for entry in self.trainer.state.log_history if name in entry
        )

    def held_out_curve(self, before: float | None, after: float | None) -> tuple[tuple[float, float], ...]:
        """Return (step, loss) of the held-out rows from `before` training to `after` it."""
        if before is None or after is None:
            return ()
        last = self.trainer.state.global_step
        between = [point for point in self.logged("eval_loss") if 0 < point[0] < last]
        return ((0, before), *between, (last, after))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good the model is at one moment."""

    loss: float | None
    """Held-out loss per learnt token; None when nothing is held out."""
    answers: tuple[str, ...]
    """To the sample questions; empty texts on ranks above 0."""


def prepare(
    job: TuningJob,
    tokenizer: "PreTrainedTokenizerBase",
    encoded: tuple[TokenizedData, TokenizedData | None],
    *,
    setting: RankSetup,
) -> TrainingSetup:
    """Load the model, attach the adapter, and set up the trainer with those who watch it."""
    from transformers import set_seed

    from runtime.tuning.train.trainer import AdapterTrainer, Workload

    train, held = encoded
    machine, ranks = setting.machine, setting.ranks
    args = training_arguments(
        job,
        OutputPaths(job.output.folder).checkpoints,
        precision=setting.precision,
        hardware=machine,
        held_out=held is not None,
    )
    sharded = job.parallel == "fsdp" and ranks.world > 1
    # What is sharded because it is too large for one GPU is read beside it, and moves a layer at a time.
    place = "cpu" if sharded else setting.device
    base = models.load(
        job.model, hardware=machine, device=place, quantization=job.quantization, training=True
    )
    set_seed(args.seed)
    model = lora.attach(base, job.lora, checkpointing=bool(asked_checkpointing(job)))
    first_weights = lora_init.begin(model, job.lora, models.locate(job.model))
    if sharded:
        fsdp.shard(model, world=ranks.world, device=setting.device)
    layout = choose_layout(job.encoding.batching, base.config.model_type)
    plan = make_plan(job, train.rows, layout=layout, ranks=ranks, hardware=machine)
    log.info(
        "%d steps an epoch of %d rows, %s in passes of at most %d tokens",
        plan.steps_per_epoch, plan.rows_per_step, layout, plan.budget_tokens,
    )  # fmt: skip
    if held is not None and "eval_strategy" not in job.training:
        evaluate_on_the_way(args, plan, held_out_tokens=held.tokens)
    survival, reporter, watchers = _watchers(job, setting)
    work = Workload(train.rows, held.rows if held else (), plan, ranks, tokenizer.pad_token_id or 0)
    trainer = AdapterTrainer(model, args, work=work, meter=setting.course.meter, watchers=watchers)
    return TrainingSetup(model, tokenizer, trainer, survival, reporter, setting, first_weights)


def _watchers(
    job: TuningJob, setting: RankSetup
) -> "tuple[CheckpointCallback, Reporter, list[TrainerCallback]]":
    from runtime.tuning.train.callbacks import CheckpointCallback, FiniteGradientsCallback, ProgressCallback

    ranks, meter = setting.ranks, setting.course.meter
    meter.world = ranks.world
    keep = job.training.get("save_total_limit", 2)
    survival = CheckpointCallback(ranks, setting.stop, minutes=job.checkpoint_minutes, keep=keep)
    reporter = Reporter(meter)
    watchers: list[TrainerCallback] = [FiniteGradientsCallback(), survival]
    if ranks.first:
        here = OutputPaths(job.output.folder)
        here.work.mkdir(parents=True, exist_ok=True)
        reporter.history = MetricsHistory(here.history)
        reporter.display = TerminalBar() if sys.stderr.isatty() else None
        watchers.append(ProgressCallback(meter, reporter))
    return survival, reporter, watchers


def evaluate(bench: TrainingSetup, questions: Sequence[Example]) -> Evaluation:
    """Return the held-out loss of all ranks and (rank 0) the answers to the sample questions."""
    ranks = bench.setting.ranks
    rows = len(bench.trainer.work.held_out)
    log.info("evaluating: the loss of %d held-out rows, the answers to %d questions", rows, len(questions))
    with attending(bench):
        loss = bench.trainer.held_out_loss() if bench.trainer.work.held_out else None
    asked = ranks.first or fsdp.is_sharded(bench.model)
    said = samples.answers(bench.model, bench.tokenizer, questions) if asked else [""] * len(questions)
    ranks.wait()
    if loss is not None:
        bench.meter.held_out_loss = loss
        log.info("held-out loss %.4f", loss)
    return Evaluation(loss, tuple(said))


@contextlib.contextmanager
def attending(bench: TrainingSetup) -> Iterator[None]:
    """Within: the model attends inside packed documents; outside as it was loaded, with a cache."""
    if bench.trainer.plan.layout != "packed":
        yield
        return
    model = cast("PreTrainedModel", bench.model.get_base_model())
    packed_attention.register()
    model.set_attn_implementation(packed_attention.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def train_through(bench: TrainingSetup, *, folder: Path, mark: str) -> None:
    """Train to the end, from the newest whole checkpoint below `folder` that belongs to `mark`.

    Raises StoppedError after SIGTERM and a checkpoint.
    """
    owner = folder / "job"
    ranks = bench.setting.ranks
    if ranks.first:
        if checkpoints.listed(folder) and (not owner.is_file() or owner.read_text(encoding="utf-8") != mark):
            log.warning("the checkpoints in %s are another job's: starting from the beginning", folder)
            shutil.rmtree(folder)
        write_atomic(owner, mark)
        if bench.survival.remote is not None:
            bench.survival.remote.restore(folder, mark)
    ranks.wait()
    resumed = checkpoints.agreed(folder, ranks)
    if resumed:
        log.info("going on from %s", resumed.name)
    try:
        tuned = bench.model
        with (
            bench.setting.stop.deferred(),
            attending(bench),
            fused_ops.rotating(tuned),
            contextlib.closing(bench.reporter),
        ):
            bench.trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except (OSError, RuntimeError, SafetensorError):  # a full disk, among others: its reason needs some room
        if ranks.first:
            checkpoints.clear_unfinished(folder)
        raise
    if bench.survival.stopped:
        step = bench.trainer.state.global_step
        raise StoppedError(f"stopped after step {step} with a checkpoint; the same command goes on from it")
