"""The parent process of a tuning job: checks, starts torchrun, and says why it ended.

Imports no torch. Does not know how to train: each worker is `python -m runtime.tuning JOB`.
Start at `run`.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from runtime import hardware, oci
from runtime.errors import CapacityError, ConfigError, Failure, StoppedError
from runtime.files import locked, write_atomic
from runtime.oci.access import DEFAULT
from runtime.tuning import fit, loggers, output, publish
from runtime.tuning.data import download
from runtime.tuning.output import OutputPaths
from runtime.tuning.process import failure
from runtime.tuning.process.nodes import ALONE, Nodes
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.report import metrics_server
from runtime.tuning.settings import CHECKPOINT_GRACE_S, TuningJob

log = logging.getLogger(__name__)

LEAST_FREE_BYTES = 512 * 2**20
"""Disk that checkpoints and an adapter of a few billion weights take; less than this is no place to start."""


def run(
    job: TuningJob,
    *,
    processes: int | None = None,
    nodes: Nodes = ALONE,
    access: oci.Access = DEFAULT,
    termination_log: Path = failure.TERMINATION_LOG,
) -> None:
    """Run this node's part of `job` to the end under torchrun.

    One process per GPU (`processes` overrides), 1 on a CPU; every node has as many. A finished job is not
    trained again, only published, which is a no-op for an image that is there.
    Raises the Failure that ended it, with its reason also in `termination_log` where that is writable.
    """
    phase = "preflight"
    with contextlib.ExitStack() as stack:
        try:
            # Rank 0 answers on this port as soon as it runs.
            port = job.metrics_port if nodes.first else None
            watched = metrics_server.serving(
                port, lambda: metrics_server.JobState(job.name, job.model.name, phase)
            )
            with StopSignal().installed(), watched:
                _preflight(job, access if nodes.first else None)
                lock = stack.enter_context(_alone(job, nodes))
                if output.is_done(job, with_adapter=nodes.first):
                    phase = "publish"
                    if nodes.first:
                        publish.again(job, access)
                    return
                fit.check(job, hardware.detect(), processes=processes)
                phase = "data"
                download.fetch(job.data, token=job.hub_token, access=access)
        except Failure as error:
            failure.tell(failure.describe(error, phase, 0), termination_log)
            raise
        entry = _train(job, processes or hardware.detect().count, nodes, lock)
    if entry is not None:
        failure.tell(entry, termination_log)
        raise failure.from_record(entry)


@contextlib.contextmanager
def _alone(job: TuningJob, nodes: Nodes) -> Iterator[int]:
    """Have this node's part of the output folder to itself; yields the lock's descriptor.

    The workers of a run that was killed may be writing their last checkpoint: they are waited for.
    """
    folder = job.output.folder
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(
                locked(OutputPaths(folder).lock(nodes.rank), wait_s=CHECKPOINT_GRACE_S + 3)
            )
        except BlockingIOError:
            raise ConfigError(
                f"output folder {folder} is in use by another run; let it end, or set another output_dir"
            ) from None
        yield lock


def _preflight(job: TuningJob, access: oci.Access | None) -> None:
    """Fail on what would fail late: loggers, an output not to be written or (with `access`) pushed to."""
    loggers.check(job.training)
    folder = job.output.folder
    try:
        OutputPaths(folder).work.mkdir(parents=True, exist_ok=True)
        probe = OutputPaths(folder).work / f"probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output folder {folder} cannot be written ({error.strerror}); make it writable for "
            f"user {os.getuid()}, or set output_dir"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES and not output.is_done(job):
        raise CapacityError(
            f"output folder {folder} has {free >> 20} MiB free, expected {LEAST_FREE_BYTES >> 20} MiB or more"
        )
    for image in (job.output.image, job.output.checkpoint_image):
        if image is not None and access is not None:
            oci.check_push(oci.parse(image), access=access)


def _train(job: TuningJob, processes: int, nodes: Nodes, lock: int) -> dict[str, object] | None:
    """Run torchrun, which shares `lock`, to its end; return the record of the failure, None after success."""
    here, ranks = OutputPaths(job.output.folder), nodes.ranks(processes)
    resolved = here.job if nodes.count == 1 else here.job.with_name(f"job-{nodes.rank}.json")
    write_atomic(resolved, job.model_dump_json(indent=1))
    for rank in ranks:  # the folder may be shared by all nodes
        here.failure(rank).unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "runtime.tuning.process.torchrun",
        "--nproc-per-node", str(processes), *nodes.torchrun(),
        "--shutdown-timeout", str(CHECKPOINT_GRACE_S),
        "-m", "runtime.tuning", str(resolved),
    ]  # fmt: skip
    log.info(
        "training with %d process%s%s",
        processes,
        "" if processes == 1 else "es",
        f" on this node, {nodes.rank} of {nodes.count}; they meet at {nodes.host}:{nodes.port}"
        if nodes.count > 1
        else "",
    )
    # Output that is no terminal stays whole lines; a session of its own lets one signal reach all of it.
    started = subprocess.Popen(command, start_new_session=True, pass_fds=[lock])  # noqa: S603
    with started as torchrun, _forwarding(torchrun) as asked:
        status = torchrun.wait()
    if status == 0:
        return None
    recorded = failure.read([here.failure(rank) for rank in ranks])
    # Another node may have been asked: then every rank agreed to stop, and each of them says so.
    agreed = [entry["kind"] for entry in recorded] == [StoppedError.__name__] * processes
    return failure.of_workers(recorded, asked=bool(asked) or agreed, status=status)


@contextlib.contextmanager
def _forwarding(child: "subprocess.Popen[bytes]") -> Iterator[list[float]]:
    """Pass SIGTERM and SIGINT on to `child`; yields the times they came. A second one kills all below it."""
    asked: list[float] = []

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(time.monotonic())
        if len(asked) > 1:
            log.warning("asked to stop again: ending at once, the last checkpoint stays")
            _kill(child.pid)
            return
        log.info("asked to stop: a checkpoint is written first (at most %d s)", CHECKPOINT_GRACE_S)
        child.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _kill(process: int) -> None:
    """Kill a process and all below it: torchrun's workers lead sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for each in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
