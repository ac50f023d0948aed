"""The model with its adapter and its trainer: set up, measured, trained through.

Does not know data files, reports or registries. Start at `prepare`.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runtime import models
from runtime.errors import StoppedError
from runtime.files import write_whole
from runtime.hardware import Hardware
from runtime.tuning import attention, checkpoints, qlora, samples, spread
from runtime.tuning.dataset import Example
from runtime.tuning.encode import Encoded
from runtime.tuning.places import Places
from runtime.tuning.precision import Precision
from runtime.tuning.progress import Meter, Reporter
from runtime.tuning.ranks import Ranks
from runtime.tuning.schedule import asked_checkpointing, choose_layout, make_plan, training_arguments
from runtime.tuning.settings import TuningJob
from runtime.tuning.stop import StopSignal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from runtime.tuning.trainer import Tuner
    from runtime.tuning.watch import Survival

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Course:
    """Where a job is, for the record of a failure."""

    meter: Meter = field(default_factory=Meter)
    phase: str = "start"

    def enter(self, phase: str) -> None:
        """Begin `phase`."""
        self.phase = phase
        log.debug("phase %s", phase)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a job runs, and who may stop or watch it."""

    machine: Hardware
    device: str
    precision: Precision
    ranks: Ranks
    stop: StopSignal
    course: Course


@dataclass(frozen=True, slots=True)
class Bench:
    """What training needs and the steps around it share."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    trainer: "Tuner"
    survival: "Survival"
    setting: Setting

    @property
    def meter(self) -> Meter:
        return self.setting.course.meter

    @property
    def recent_loss(self) -> float:
        """Mean of the losses logged in the last epoch."""
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        recent = losses[-self.trainer.plan.steps_per_epoch :]
        return sum(recent) / len(recent) if recent else float("nan")


@dataclass(frozen=True, slots=True)
class Measured:
    """How good the model is at one moment."""

    loss: float | None
    """Held-out loss per learnt token; None when nothing is held out."""
    answers: tuple[str, ...]
    """To the sample questions; empty texts on ranks above 0."""


def prepare(
    job: TuningJob,
    tokenizer: "PreTrainedTokenizerBase",
    encoded: tuple[Encoded, Encoded | None],
    *,
    setting: Setting,
) -> Bench:
    """Load the model, attach the adapter, and set up the trainer with those who watch it."""
    from transformers import set_seed

    from runtime.tuning.trainer import Tuner, Workload

    train, held = encoded
    machine, ranks = setting.machine, setting.ranks
    args = training_arguments(
        job,
        Places(job.output.folder).checkpoints,
        precision=setting.precision,
        hardware=machine,
        held_out=held is not None,
    )
    base = models.load(
        job.model, hardware=machine, device=setting.device, quantization=job.quantization, training=True
    )
    set_seed(args.seed)
    model = qlora.attach(base, job.lora, checkpointing=bool(asked_checkpointing(job)))
    layout = choose_layout(job.encoding.batching, base.config.model_type)
    plan = make_plan(job, train.rows, layout=layout, ranks=ranks, hardware=machine)
    log.info(
        "%d steps an epoch of %d rows, %s in passes of at most %d tokens",
        plan.steps_per_epoch, plan.rows_per_step, layout, plan.budget_tokens,
    )  # fmt: skip
    survival, watchers = _watchers(job, setting)
    work = Workload(train.rows, held.rows if held else (), plan, ranks, tokenizer.pad_token_id or 0)
    trainer = Tuner(model, args, work=work, meter=setting.course.meter, watchers=watchers)
    return Bench(model, tokenizer, trainer, survival, setting)


def _watchers(job: TuningJob, setting: Setting) -> "tuple[Survival, list[TrainerCallback]]":
    from runtime.tuning.watch import FiniteGradients, Sight, Survival

    ranks, meter = setting.ranks, setting.course.meter
    meter.world = ranks.world
    keep = job.training.get("save_total_limit", 2)
    survival = Survival(ranks, setting.stop, minutes=job.checkpoint_minutes, keep=keep)
    watchers: list[TrainerCallback] = [FiniteGradients(), survival]
    if ranks.first:
        here = Places(job.output.folder)
        here.work.mkdir(parents=True, exist_ok=True)
        watchers.append(Sight(meter, Reporter(meter, here.history)))
    return survival, watchers


def evaluate(bench: Bench, questions: Sequence[Example]) -> Measured:
    """Return the held-out loss of all ranks and (rank 0) the answers to the sample questions."""
    ranks = bench.setting.ranks
    with attending(bench):
        loss = bench.trainer.held_out_loss() if bench.trainer.work.held_out else None
    said = samples.answers(bench.model, bench.tokenizer, questions) if ranks.first else [""] * len(questions)
    ranks.wait()
    if loss is not None:
        log.info("held-out loss %.4f", loss)
    return Measured(loss, tuple(said))


@contextlib.contextmanager
def attending(bench: Bench) -> Iterator[None]:
    """Within: the model attends inside packed documents; outside as it was loaded, with a cache."""
    if bench.trainer.plan.layout != "packed":
        yield
        return
    model = cast("PreTrainedModel", bench.model.get_base_model())
    attention.register()
    model.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def train_through(bench: Bench, *, folder: Path, mark: str) -> None:
    """Train to the end, from the newest whole checkpoint below `folder` that belongs to `mark`.

    Raises StoppedError after SIGTERM and a checkpoint.
    """
    owner = folder / "job"
    ranks = bench.setting.ranks
    if ranks.first:
        if checkpoints.listed(folder) and (not owner.is_file() or owner.read_text(encoding="utf-8") != mark):
            log.warning("the checkpoints in %s are another job's: starting from the beginning", folder)
            shutil.rmtree(folder)
        write_whole(owner, mark)
        if bench.survival.remote is not None:
            bench.survival.remote.restore(folder, mark)
    ranks.wait()
    resumed = spread.agreed(folder, ranks)
    if resumed:
        log.info("going on from %s", resumed.name)
    with bench.setting.stop.deferred(), attending(bench):
        bench.trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if bench.survival.stopped:
        step = bench.trainer.state.global_step
        raise StoppedError(f"stopped after step {step} with a checkpoint; the same command goes on from it")
