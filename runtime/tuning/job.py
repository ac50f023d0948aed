"""One tuning job, from data to a published adapter, as every rank runs it.

Knows the order of the steps and nothing else: each is a module of its own. Start at `run`.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runtime import adapters, hardware, models, oci
from runtime.errors import StoppedError
from runtime.hardware import Hardware
from runtime.oci.access import DEFAULT
from runtime.tuning import (
    attention,
    checkpoints,
    dataset,
    encode,
    fetch,
    places,
    publish,
    qlora,
    remote,
    report,
    samples,
)
from runtime.tuning.dataset import Dataset, Example
from runtime.tuning.encode import Encoded
from runtime.tuning.places import Places
from runtime.tuning.precision import Precision, settle
from runtime.tuning.progress import Meter, Reporter, memory_bytes
from runtime.tuning.ranks import Ranks
from runtime.tuning.schedule import (
    MAX_TOKENS,
    choose_layout,
    make_plan,
    training_arguments,
    wants_checkpointing,
)
from runtime.tuning.settings import TuningJob
from runtime.tuning.split import split
from runtime.tuning.stop import StopSignal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
class Bench:
    """What training needs and the steps around it share."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    trainer: "Tuner"
    survival: "Survival"


def run(
    job: TuningJob, *, ranks: Ranks, stop: StopSignal, course: Course, access: oci.Access = DEFAULT
) -> None:
    """Tune, write the adapter and its report into the output folder, and publish it.

    A finished job is only published again; an interrupted one goes on from its newest whole checkpoint.
    Raises the Failure that ended it; StoppedError after SIGTERM and a checkpoint.
    """
    began = time.monotonic()
    if places.is_done(job):
        log.info("%s holds this job's finished adapter: nothing is trained", job.output.folder)
        publish.publish(job, access)
        return
    asked, machine = job, hardware.detect()
    device = hardware.device(machine, ranks.local_rank)
    ranks.join(device)
    job, precision = settle(job, machine)

    course.enter("data")
    data, train, held_out = _read(job, ranks, access)
    course.enter("encode")
    tokenizer = models.load_tokenizer(job.model)
    job, encoded, held = _encode(job, tokenizer, train, held_out)
    course.enter("model")
    bench = _prepare(
        job, tokenizer, (encoded, held), precision=precision, setting=(ranks, machine, device, stop, course)
    )

    bench.survival.remote = remote.of(job, access) if ranks.first else None

    course.enter("evaluate")
    asked_samples = samples.questions(held_out or train)
    before = _evaluate(bench, asked_samples, ranks)
    course.enter("train")
    _train(bench, job, asked, data, stop=stop)
    course.enter("evaluate")
    after = _evaluate(bench, asked_samples, ranks)

    course.enter("save")
    meter = course.meter
    outcome = report.Outcome(
        steps=bench.trainer.state.global_step,
        train_loss=_recent_loss(bench.trainer),
        held_out_loss_before=before[0],
        held_out_loss_after=after[0],
        samples=tuple(
            samples.Sample(example.messages[-2]["content"], example.messages[-1]["content"], old, new)
            for example, old, new in zip(asked_samples, before[1], after[1], strict=True)
        ),
        seconds=time.monotonic() - began,
        tokens_per_s=meter.tokens_per_s,
        peak_memory_bytes=memory_bytes(),
    )
    if ranks.first:
        _save(asked, job, bench, report.build(job, data, (encoded, held), outcome))
        course.enter("publish")
        publish.publish(asked, access)
        if bench.survival.remote is not None:
            bench.survival.remote.clear()
    ranks.wait()


def _read(job: TuningJob, ranks: Ranks, access: oci.Access) -> tuple[Dataset, list[Example], list[Example]]:
    """Fetch (rank 0), read and split the data: every rank sees the same rows in the same order."""
    if ranks.first:
        fetch.fetch(job.data, token=job.hub_token, access=access)
    ranks.wait()
    data = dataset.load(job.data, fetch.targets(job.data))
    train, held_out = split(data.examples, job.data)
    log.info(
        "%d rows from %d files: %d to train on, %d held out, %d skipped",
        len(data.examples), len(data.files), len(train), len(held_out), data.skipped,
    )  # fmt: skip
    return data, train, held_out


def _encode(
    job: TuningJob,
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> tuple[TuningJob, Encoded, Encoded | None]:
    """Encode both parts, with the longest row settled from the model's context when the job names none."""
    limit = job.encoding.max_tokens or min(_context_tokens(models.locate(job.model)), MAX_TOKENS)
    job = job.model_copy(update={"encoding": job.encoding.model_copy(update={"max_tokens": limit})})
    encoded = encode.encode(train, tokenizer, job.encoding, max_tokens=limit)
    held = encode.encode(held_out, tokenizer, job.encoding, max_tokens=limit) if held_out else None
    log.info(
        "%d tokens, %d of them learnt; %d rows cut at %d tokens, %d dropped as too long, %d without a label",
        encoded.tokens, encoded.targets, encoded.truncated, limit, encoded.too_long, encoded.unlabelled,
    )  # fmt: skip
    return job, encoded, held


def _context_tokens(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or MAX_TOKENS)


def _prepare(
    job: TuningJob,
    tokenizer: "PreTrainedTokenizerBase",
    encoded: tuple[Encoded, Encoded | None],
    *,
    precision: Precision,
    setting: tuple[Ranks, Hardware, str, StopSignal, Course],
) -> Bench:
    """Load the model, attach the adapter, and set up the trainer with those who watch it."""
    from transformers import TrainerCallback, set_seed

    from runtime.tuning.trainer import Tuner, Workload
    from runtime.tuning.watch import FiniteGradients, Sight, Survival

    ranks, machine, device, stop, course = setting
    train, held = encoded
    here = Places(job.output.folder)
    args = training_arguments(
        job, here.checkpoints, precision=precision, hardware=machine, held_out=held is not None
    )
    base = models.load(
        job.model, hardware=machine, device=device, quantization=job.quantization, training=True
    )
    set_seed(args.seed)
    model = qlora.attach(base, job.lora, checkpointing=wants_checkpointing(job, machine))
    layout = choose_layout(job.encoding.batching, base.config.model_type)
    plan = make_plan(job, train.rows, layout=layout, ranks=ranks, hardware=machine)
    log.info(
        "%d steps an epoch of %d rows, %s in passes of at most %d tokens",
        plan.steps_per_epoch, plan.rows_per_step, layout, plan.budget_tokens,
    )  # fmt: skip
    course.meter.world = ranks.world
    survival = Survival(
        ranks, stop, minutes=job.checkpoint_minutes, keep=job.training.get("save_total_limit", 2)
    )
    watchers: list[TrainerCallback] = [FiniteGradients(), survival]
    if ranks.first:
        here.work.mkdir(parents=True, exist_ok=True)
        watchers.append(Sight(course.meter, Reporter(course.meter, here.history)))
    work = Workload(train.rows, held.rows if held else (), plan, ranks, tokenizer.pad_token_id or 0)
    trainer = Tuner(model, args, work=work, meter=course.meter, watchers=watchers)
    return Bench(model, tokenizer, trainer, survival)


def _evaluate(bench: Bench, asked: Sequence[Example], ranks: Ranks) -> tuple[float | None, list[str]]:
    """Return the held-out loss and (rank 0) the answers to the sample questions."""
    with _attending(bench):
        loss = bench.trainer.held_out_loss() if bench.trainer.work.held_out else None
    said = samples.answers(bench.model, bench.tokenizer, asked) if ranks.first else [""] * len(asked)
    ranks.wait()
    if loss is not None:
        log.info("held-out loss %.4f", loss)
    return loss, said


class _attending:  # noqa: N801 (used as a function)
    """Within: the model attends inside packed documents; outside as it was loaded, with a cache."""

    def __init__(self, bench: Bench) -> None:
        self.model: PreTrainedModel = cast("PreTrainedModel", bench.model.get_base_model())
        self.packed = bench.trainer.plan.layout == "packed"
        self.usual = "sdpa"

    def __enter__(self) -> None:
        if self.packed:
            attention.register()
            self.model.set_attn_implementation(attention.NAME)

    def __exit__(self, *_: object) -> None:
        if self.packed:
            self.model.set_attn_implementation(self.usual)


def _train(bench: Bench, job: TuningJob, asked: TuningJob, data: Dataset, *, stop: StopSignal) -> None:
    """Train from the newest whole checkpoint of this very job to the end; StoppedError after SIGTERM."""
    folder = Places(job.output.folder).checkpoints
    mark = places.fingerprint(asked, "".join(file.sha256 for file in data.files))
    owner = folder / "job"
    ranks = bench.trainer.work.ranks
    if ranks.first:
        if checkpoints.listed(folder) and (not owner.is_file() or owner.read_text(encoding="utf-8") != mark):
            log.warning("the checkpoints in %s are another job's: starting from the beginning", folder)
            shutil.rmtree(folder)
        places.write_whole(owner, mark)
        if bench.survival.remote is not None:
            bench.survival.remote.restore(folder, mark)
    ranks.wait()
    resumed = checkpoints.newest(folder)
    if resumed:
        log.info("going on from %s", resumed.name)
    with stop.deferred(), _attending(bench):
        bench.trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if bench.survival.stopped:
        step = bench.trainer.state.global_step
        raise StoppedError(f"stopped after step {step} with a checkpoint; the same command goes on from it")


def _recent_loss(trainer: "Tuner") -> float:
    """Return the mean of the losses logged in the last epoch."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    recent = losses[-trainer.plan.steps_per_epoch :]
    return sum(recent) / len(recent) if recent else float("nan")


def _save(asked: TuningJob, job: TuningJob, bench: Bench, summary: dict[str, object]) -> None:
    """Write the adapter, the report, and last of all the sentinel that a pusher waits for."""
    here = Places(job.output.folder)
    here.sentinel.unlink(missing_ok=True)
    here.finished.unlink(missing_ok=True)
    adapters.save(bench.model, here.folder, source=job.model, beside=bench.tokenizer.save_pretrained)
    weights = (here.folder / "adapter_model.safetensors").read_bytes()
    summary["adapter_sha256"] = hashlib.sha256(weights).hexdigest()
    report.save(summary, here.report)
    places.mark_done(asked)
    shutil.rmtree(here.checkpoints, ignore_errors=True)
    log.info("adapter and report are in %s", here.folder)
