"""One tuning job, from data to a published adapter, as every rank runs it.

Knows the order of the steps and nothing else: each is a module of its own. Start at `run`.
"""

import logging
import shutil
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from runtime import adapters, garbage_collection, hardware, models, oci, torch_build
from runtime.files import sha256
from runtime.oci.access import DEFAULT
from runtime.tuning import fit, identity, output, publish
from runtime.tuning.data import download, encoding
from runtime.tuning.data.encoded import EncodingFacts
from runtime.tuning.data.encoding import DataEncoder
from runtime.tuning.data.tokenize import TokenizedSplit
from runtime.tuning.identity import JobIdentity
from runtime.tuning.output import OutputPaths
from runtime.tuning.precision import resolve_precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.report import report
from runtime.tuning.settings import TuningJob
from runtime.tuning.train import checkpoint_sync, setup
from runtime.tuning.train.evaluation import Evaluation, evaluate
from runtime.tuning.train.progress import JobProgress, Reporter, Throughput, memory_bytes
from runtime.tuning.train.setup import RankSetup, TrainingSetup
from runtime.tuning.train.terminal_bar import TerminalBar
from runtime.weights_digest import PendingDigest

log = logging.getLogger(__name__)

ENCODING_INTERVAL_S = 10.0
"""Least time between two lines of the log on how many rows are encoded."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What the steps up to the second evaluation have produced."""

    job: TuningJob
    """With the settings that the hardware, the data and the memory plan have decided."""
    owner: JobIdentity
    data: EncodingFacts
    tokenized: TokenizedSplit
    training: TrainingSetup
    before: Evaluation
    after: Evaluation
    planned_memory_bytes: int | None
    weights: PendingDigest | None
    """Digest of the base model's weights; None on other ranks than the first."""


def run(
    requested: TuningJob,
    *,
    ranks: Ranks,
    stop: StopSignal,
    progress: JobProgress,
    access: oci.Access = DEFAULT,
) -> None:
    """Tune, write the adapter and its report into the output folder, and publish it.

    A finished job is only published again; an interrupted one resumes from its newest complete checkpoint.
    Raises the Failure that ended it; StoppedError after SIGTERM and a checkpoint.
    """
    started, machine = time.monotonic(), hardware.detect()
    torch_build.check_loaded(machine)
    device = hardware.device(machine, ranks.local_rank)
    ranks.init_process_group(device)
    # rank 0 decides: other nodes may have disks of their own
    if ranks.broadcast(ranks.is_main and output.is_done(requested)):
        if ranks.is_main:
            publish.publish_again(requested, access)
        return
    if ranks.is_main:
        output.check_replaceable(requested)  # a controller's accelerate starts ranks without a launcher
    job, precision = resolve_precision(requested, machine)
    job = fit.shorten(job, machine, processes=ranks.local_world_size)
    rank = RankSetup(machine, device, precision, ranks, stop, progress)
    result = _tune(requested, job, rank, access)
    if ranks.is_main:
        progress.enter("save")
        _save(requested, result, seconds=time.monotonic() - started)
        progress.enter("publish")
        publish.publish(requested, access)
        if (registry := result.training.callbacks.checkpoint.registry) is not None:
            registry.clear()
    ranks.barrier()
    if ranks.is_local_main:
        encoding.remove(OutputPaths(job.output.folder).work)
        if not ranks.is_main:  # on a disk of its own: a rerun of this node returns at once
            output.mark_finished(requested, result.owner)


def _tune(requested: TuningJob, job: TuningJob, rank: RankSetup, access: oci.Access) -> JobResult:
    """Read and tokenize the data, then evaluate, train and evaluate again."""
    ranks, progress = rank.ranks, rank.progress
    with ranks.said_once():  # the template's warnings are the same on all ranks
        progress.enter("data")
        with ranks.together():
            if ranks.is_local_main:
                download.fetch(job.data, token=job.hub_token, access=access)
        with garbage_collection.paused():
            tokenizer = models.load_tokenizer(job.model)
        with closing(_reporter(ranks)) as reporter:
            show = partial(reporter.show_activity, "encoding row", with_speed=True)
            encoder = DataEncoder(job, tokenizer, progress.enter, show)
            data = encoder.on_this_node(ranks, OutputPaths(job.output.folder).make_work())
    tokenized, questions = data.tokenized(), data.facts.questions
    settled = job.encoding.model_copy(update={"max_tokens": data.facts.max_tokens})
    job = job.model_copy(update={"encoding": settled})
    job, planned = fit.resolve(job, rank.machine, processes=ranks.local_world_size, rows=tokenized.sequences)
    progress.enter("model")
    weights = models.digest(requested.model) if ranks.is_main else None
    if weights is not None:
        weights.start()
    with garbage_collection.paused():
        training = setup.prepare(job, tokenizer, tokenized, rank=rank)
    if ranks.is_main:
        training.callbacks.checkpoint.registry = checkpoint_sync.registry_checkpoints(job, access)
    progress.enter("evaluate")
    before = evaluate(training, questions)
    progress.enter("train")
    owner = _identify(requested, data.facts, tokenized, ranks)
    setup.run_training(training, folder=OutputPaths(job.output.folder).checkpoints, owner=owner)
    progress.enter("evaluate")
    after = evaluate(training, questions)
    return JobResult(job, owner, data.facts, tokenized, training, before, after, planned, weights)


def _reporter(ranks: Ranks) -> Reporter:
    """Return what shows how far the encoding of rows is."""
    watched = ranks.is_main and sys.stderr.isatty()
    return Reporter(Throughput(), display=TerminalBar() if watched else None, interval_s=ENCODING_INTERVAL_S)


def _identify(
    requested: TuningJob, data: EncodingFacts, tokenized: TokenizedSplit, ranks: Ranks
) -> JobIdentity:
    """Return whose checkpoints and adapter these are, as rank 0 sees the base model and the data."""
    if not ranks.is_main:
        return ranks.broadcast(JobIdentity({}))
    return ranks.broadcast(
        replace(
            identity.requested(requested),
            model=identity.model_digest(models.locate(requested.model)),
            files=data.summary.digests,
            rows=identity.rows_digest(tokenized),
            # without a batch size a step has the same rows on any number of GPUs
            processes=ranks.world_size if requested.training.get("per_device_train_batch_size") else 0,
        )
    )


def _save(requested: TuningJob, result: JobResult, *, seconds: float) -> None:
    """Write the adapter and the report, then what marks them as done; an earlier adapter stays until then."""
    job, training = result.job, result.training
    summary = report.build(job, result.data.summary, result.tokenized, _outcome(result, seconds))
    paths = OutputPaths(job.output.folder)
    with output.replacing(requested, result.owner) as scratch:
        adapters.save(
            training.model,
            scratch,
            source=job.model,
            first_weights=training.adapter.first_weights,
            beside=partial(models.save_tokenizer, training.tokenizer),
        )
        if result.weights is not None:
            summary["model"] |= report.weights_of(result.weights)
        summary["adapter_sha256"] = sha256(scratch / adapters.WEIGHTS_FILE)
        report.save(summary, scratch)
    shutil.rmtree(paths.checkpoints, ignore_errors=True)
    log.info("adapter and report are in %s", paths.folder)


def _outcome(result: JobResult, seconds: float) -> report.Outcome:
    """Gather the results for the report."""
    training, before, after = result.training, result.before, result.after
    rank = training.rank
    return report.Outcome(
        steps=training.trainer.state.global_step,
        kept_step=training.kept_step,
        epochs=training.trainer.state.epoch or 0.0,
        train_loss=training.recent_loss,
        losses=training.logged("loss"),
        held_out_losses=training.held_out_curve(before.loss, after.loss),
        samples=tuple(
            report.Sample(
                question.messages[-2]["content"],
                question.messages[-1]["content"],
                old.text,
                new.text,
                ended_before=old.ended,
                ended_after=new.ended,
            )
            for question, old, new in zip(result.data.questions, before.answers, after.answers, strict=True)
        ),
        seconds=seconds,
        tokens_per_s=training.throughput.tokens_per_s,
        peak_memory_bytes=memory_bytes(),
        planned_memory_bytes=result.planned_memory_bytes,
        machine=report.Machine(rank.machine, rank.ranks.world_size, rank.precision.dtype),
    )
