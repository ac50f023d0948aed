"""One tuning job, from data to a published adapter, as every rank runs it.

Knows the order of the steps and nothing else: each is a module of its own. Start at `run`.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime import adapters, garbage_collection, hardware, models, oci
from runtime.files import sha256
from runtime.oci.access import DEFAULT
from runtime.tuning import fit, output, publish
from runtime.tuning.data import dataset, download, formats, tokenize
from runtime.tuning.data.dataset import Dataset, Example, split
from runtime.tuning.data.tokenize import TokenizedData
from runtime.tuning.output import OutputPaths
from runtime.tuning.precision import settle
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.report import report, samples
from runtime.tuning.report.progress import memory_bytes
from runtime.tuning.settings import TuningJob
from runtime.tuning.train import checkpoints
from runtime.tuning.train.arguments import longest_row
from runtime.tuning.train.setup import (
    Evaluation,
    JobProgress,
    RankSetup,
    TrainingSetup,
    evaluate,
    prepare,
    train_through,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def run(
    job: TuningJob, *, ranks: Ranks, stop: StopSignal, course: JobProgress, access: oci.Access = DEFAULT
) -> None:
    """Tune, write the adapter and its report into the output folder, and publish it.

    A finished job is only published again; an interrupted one goes on from its newest whole checkpoint.
    Raises the Failure that ended it; StoppedError after SIGTERM and a checkpoint.
    """
    began = time.monotonic()
    asked, machine = job, hardware.detect()
    device = hardware.device(machine, ranks.local_rank)
    ranks.join(device)
    if ranks.told(output.is_done(job)):  # rank 0's word: other nodes may have disks of their own
        if ranks.first:
            publish.again(job, access)
        return
    job, precision = settle(job, machine)
    job = fit.shorten(job, machine, processes=ranks.local_world)

    course.enter("data")
    data, train, held_out = _read(job, ranks, access)
    course.enter("encode")
    with garbage_collection.paused():
        tokenizer = models.load_tokenizer(job.model)
    job, encoded = _encode(job, tokenizer, train, held_out)
    rows = (*encoded[0].rows, *(encoded[1].rows if encoded[1] else ()))
    job, planned = fit.settle(job, machine, processes=ranks.local_world, rows=rows)
    course.enter("model")
    with garbage_collection.paused():
        setting = RankSetup(machine, device, precision, ranks, stop, course)
        bench = prepare(job, tokenizer, encoded, setting=setting)
    bench.survival.remote = checkpoints.of(job, access) if ranks.first else None
    course.enter("evaluate")
    questions = samples.questions(held_out or train)
    before = evaluate(bench, questions)
    course.enter("train")
    train_through(
        bench, folder=OutputPaths(job.output.folder).checkpoints, mark=output.fingerprint(asked, data.digest)
    )
    course.enter("evaluate")
    after = evaluate(bench, questions)
    course.enter("save")
    if ranks.first:
        took = time.monotonic() - began
        outcome = _outcome(bench, questions, (before, after), seconds=took, planned_memory_bytes=planned)
        _save(asked, job, bench, report.build(job, data, encoded, outcome))
        course.enter("publish")
        publish.publish(asked, access)
        if bench.survival.remote is not None:
            bench.survival.remote.clear()
    ranks.wait()
    if ranks.leads and not ranks.first:
        output.mark_finished(asked)  # on a disk of its own: a rerun of this node has nothing to wait for


def _read(job: TuningJob, ranks: Ranks, access: oci.Access) -> tuple[Dataset, list[Example], list[Example]]:
    """Fetch (once on each node), read and split the data: all ranks see the same rows in the same order."""
    if ranks.leads:
        download.fetch(job.data, token=job.hub_token, access=access)
    ranks.wait()
    data = dataset.load(job.data, formats.targets(job.data))
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
) -> tuple[TuningJob, tuple[TokenizedData, TokenizedData | None]]:
    """Encode both parts, with the longest row settled from the model's context when the job names none."""
    limit = longest_row(job)
    job = job.model_copy(update={"encoding": job.encoding.model_copy(update={"max_tokens": limit})})
    encoded = tokenize.encode(train, tokenizer, job.encoding, max_tokens=limit)
    held = tokenize.encode(held_out, tokenizer, job.encoding, max_tokens=limit) if held_out else None
    log.info(
        "%d tokens, %d of them learnt; %d rows cut at %d tokens, %d dropped as too long, %d without a label",
        encoded.tokens, encoded.targets, encoded.truncated, limit, encoded.too_long, encoded.unlabelled,
    )  # fmt: skip
    return job, (encoded, held)


def _outcome(
    bench: TrainingSetup,
    questions: Sequence[Example],
    measured: tuple[Evaluation, Evaluation],
    *,
    seconds: float,
    planned_memory_bytes: int | None,
) -> report.Outcome:
    """Gather what training changed."""
    (before, after), setting = measured, bench.setting
    return report.Outcome(
        steps=bench.trainer.state.global_step,
        train_loss=bench.recent_loss,
        losses=bench.logged("loss"),
        held_out_losses=bench.held_out_curve(before.loss, after.loss),
        samples=tuple(
            samples.Sample(question.messages[-2]["content"], question.messages[-1]["content"], old, new)
            for question, old, new in zip(questions, before.answers, after.answers, strict=True)
        ),
        seconds=seconds,
        tokens_per_s=bench.meter.tokens_per_s,
        peak_memory_bytes=memory_bytes(),
        planned_memory_bytes=planned_memory_bytes,
        machine=report.Machine(setting.machine, setting.ranks.world, setting.precision.dtype),
    )


def _save(asked: TuningJob, job: TuningJob, bench: TrainingSetup, summary: dict[str, object]) -> None:
    """Write the adapter, the report, and last of all the sentinel that a pusher waits for."""
    here = OutputPaths(job.output.folder)
    here.sentinel.unlink(missing_ok=True)
    here.finished.unlink(missing_ok=True)
    adapters.save(
        bench.model,
        here.folder,
        source=job.model,
        first_weights=bench.first_weights,
        beside=bench.tokenizer.save_pretrained,
    )
    summary["adapter_sha256"] = sha256(here.folder / adapters.WEIGHTS_FILE)
    report.save(summary, here.folder)
    output.mark_done(asked)
    shutil.rmtree(here.checkpoints, ignore_errors=True)
    log.info("adapter and report are in %s", here.folder)
