"""The parent process of a tuning job: checks it, starts torchrun, and reports why it ended.

Imports no torch. Does not know how to train: each worker is `python -m runtime.tuning JOB` (worker.py).
Start at `run`.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from runtime import files, hardware, oci, torch_build
from runtime.errors import CapacityError, ConfigError, Failure, StoppedError
from runtime.files import locked
from runtime.logs import counted
from runtime.oci.access import DEFAULT
from runtime.tuning import fit, loggers, output, publish
from runtime.tuning.data import download
from runtime.tuning.output import OutputPaths
from runtime.tuning.process import failure
from runtime.tuning.process.nodes import SINGLE_NODE, Nodes
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.report import metrics_server, report, verdict
from runtime.tuning.settings import CHECKPOINT_GRACE_S, TuningJob
from runtime.tuning.signing import signing_key
from runtime.tuning.train import checkpoint_sync
from runtime.tuning.train.progress import JobProgress, JobState

log = logging.getLogger(__name__)

LEAST_FREE_BYTES = 512 * 2**20
"""Disk that checkpoints and an adapter for a few billion weights take; with less, no job is started."""


def run(
    job: TuningJob,
    *,
    processes: int | None = None,
    nodes: Nodes = SINGLE_NODE,
    access: oci.Access = DEFAULT,
    termination_log: Path = failure.TERMINATION_LOG,
) -> None:
    """Run this node's part of `job` to the end under torchrun.

    One process per GPU (`processes` overrides), 1 on a CPU; every node has as many. A finished job is not
    trained again, only published, which is a no-op for an image that is there.
    Raises the Failure that ended it, with its reason also in `termination_log` where that is writable.
    """
    progress = JobProgress(phase="preflight")
    with contextlib.ExitStack() as stack:
        try:
            with StopSignal().installed(), _metrics(job, nodes, progress):
                _preflight(job, access if nodes.is_main else None)
                lock = stack.enter_context(_output_lock(job, nodes))
                if output.is_done(job, with_adapter=nodes.is_main):
                    progress.enter("publish")
                    if nodes.is_main:
                        publish.publish_again(job, access)
                    return
                machine = torch_build.usable_hardware(quantized=job.quantization is not None)
                hardware.check_processes(machine, processes)
                fit.check(job, machine, processes=processes)
                progress.enter("data")
                download.fetch(job.data, token=job.hub_token, access=access)
        except Failure as error:
            failure.write_termination_log(failure.describe(error, progress.phase, 0), termination_log)
            raise
        record = _train(job, processes or machine.count, nodes, lock)
    if record is not None:
        failure.write_termination_log(record, termination_log)
        raise failure.from_record(record)
    if nodes.is_main and (written := report.read(job.output.folder)):
        log.info("%s", verdict.summary(written))


def _metrics(
    job: TuningJob, nodes: Nodes, progress: JobProgress
) -> contextlib.AbstractContextManager[int | None]:
    """Serve /metrics and /health on node 0 until its rank 0 does so on the same port."""
    address = metrics_server.address(job) if nodes.is_main else None

    def state() -> JobState:
        return JobState(job.name, job.model.name, progress.phase)

    return metrics_server.serving(address, state, announced=False)


def _preflight(job: TuningJob, access: oci.Access | None) -> None:
    """Fail early: missing loggers, a folder or (with `access`) an image that must not be written."""
    files.check_temporary()
    loggers.check(job.training)
    folder = job.output.folder
    try:
        with tempfile.TemporaryFile(dir=OutputPaths(folder).make_work()):
            pass  # without a name, which a killed process would leave
    except OSError as error:
        raise ConfigError(
            f"output folder {folder} cannot be written ({error.strerror}); make it writable for "
            f"user {os.getuid()}, or set output_dir"
        ) from None
    if access is not None:
        output.check_replaceable(job)
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES and not output.is_done(job):
        raise CapacityError(
            f"output folder {folder} has {free >> 20} MiB free, expected {LEAST_FREE_BYTES >> 20} MiB or more"
        )
    if access is not None:
        signing_key(job, access)
    for image, replaces in ((job.output.image, False), (job.output.checkpoint_image, True)):
        if image is not None and access is not None:
            oci.check_push(oci.parse(image), access=access, replaces=replaces)
    if access is not None:
        checkpoint_sync.check_free(job, access)


@contextlib.contextmanager
def _output_lock(job: TuningJob, nodes: Nodes) -> Iterator[int]:
    """Hold this node's lock of the output folder; yields the lock's descriptor.

    Waits for the workers of a run that was killed, which may be writing their last checkpoint.
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


def _train(job: TuningJob, processes: int, nodes: Nodes, lock: int) -> dict[str, object] | None:
    """Run torchrun, which inherits `lock`, to its end; return the failure record, None after success."""
    paths, ranks = OutputPaths(job.output.folder), nodes.ranks(processes)
    resolved = paths.job if nodes.count == 1 else paths.job.with_name(f"job-{nodes.rank}.json")
    output.write_job(resolved, job)
    for rank in ranks:  # the folder may be shared by all nodes
        paths.failure(rank).unlink(missing_ok=True)
    log.info("training with %s", _world(processes, nodes))
    # Output that is no terminal stays whole lines; a session of its own lets one signal reach all of it.
    started = subprocess.Popen(  # noqa: S603
        _torchrun_command(processes, nodes, resolved), start_new_session=True, pass_fds=[lock]
    )
    with started as torchrun, _forwarding_signals(torchrun) as signals:
        status = torchrun.wait()
    output.forget(resolved, job)
    if status == 0:
        return None
    records = failure.read_records([paths.failure(rank) for rank in ranks])
    # The signal may have come to another node: then every rank stopped, and recorded that.
    all_stopped = [record["kind"] for record in records] == [StoppedError.__name__] * processes
    return failure.combine(records, stop_requested=bool(signals) or all_stopped, status=status)


def _torchrun_command(processes: int, nodes: Nodes, resolved: Path) -> list[str]:
    return [
        sys.executable, "-m", "runtime.tuning.process.torchrun",
        "--nproc-per-node", str(processes), *nodes.torchrun_options(),
        "--shutdown-timeout", str(CHECKPOINT_GRACE_S),
        "-m", "runtime.tuning", str(resolved),
    ]  # fmt: skip


def _world(processes: int, nodes: Nodes) -> str:
    text = counted(processes, "process", "processes")
    if nodes.count > 1:
        text += f" on node {nodes.rank} of {nodes.count}, rendezvous at {nodes.host}:{nodes.port}"
    return text


@contextlib.contextmanager
def _forwarding_signals(child: "subprocess.Popen[bytes]") -> Iterator[list[float]]:
    """Forward SIGTERM and SIGINT to `child`; yields the times of both. A second one kills its whole tree."""
    received: list[float] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(time.monotonic())
        if len(received) > 1:
            log.warning("second signal: ending at once, the last checkpoint stays")
            _kill_tree(child.pid)
            return
        log.info("stopping after a checkpoint, which may take up to %d s", CHECKPOINT_GRACE_S)
        child.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _kill_tree(process: int) -> None:
    """Kill a process and all its descendants: torchrun's workers lead sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for each in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
