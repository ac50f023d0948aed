"""One rank of a tuning job, from its first signal handler to its exit code.

Knows ranks, stop signals and failure records; does not know where the job comes from. Start at `work`.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import SecretStr

from runtime import attention, logs
from runtime.config import parse, read_text
from runtime.errors import ConfigError, Failure, StoppedError, exit_code
from runtime.tuning import job, loggers, publish
from runtime.tuning.output import OutputPaths
from runtime.tuning.process import failure
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal, end_with_parent
from runtime.tuning.report import metrics_server
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.progress import JobProgress

log = logging.getLogger("runtime.tuning")


def work(read: Callable[[], TuningJob], *, termination_log: Path | None = None) -> int:
    """Run one rank of the job that `read` returns; return the exit code, or end the process with it.

    `termination_log` is where the first rank to fail writes why, in a pod without our parent process.
    """
    debug = os.environ.get("DEBUG_MODE", "").lower() == "true"
    ranks = Ranks.read(os.environ)
    logs.configure(debug=debug, rank=ranks.rank)
    end_with_parent()
    stop, progress = StopSignal(), JobProgress()
    stop.install()
    requested: TuningJob | None = None
    try:
        requested = read()
        _run(requested, ranks, stop, progress)
    except Exception as error:  # the process's edge: whatever ended the rank is recorded
        reason = failure.as_failure(error)
        _record(reason, requested, ranks, progress=progress, termination_log=termination_log)
        foreseen, stopped = isinstance(error, Failure), isinstance(error, StoppedError)
        log.log(
            logging.INFO if stopped else logging.ERROR,
            "rank %d: %s",
            ranks.rank,
            reason,
            exc_info=None if foreseen and not debug else error,
        )
        # Peers may be waiting in a collective that this rank will never join: exit without its cleanup.
        logging.shutdown()
        os._exit(exit_code(reason))
    ranks.destroy_process_group()
    return 0


def _run(requested: TuningJob, ranks: Ranks, stop: StopSignal, progress: JobProgress) -> None:
    loggers.check(requested.training)
    for name, value in loggers.environment(requested.output.folder).items():
        os.environ.setdefault(name, value)
    access = publish.access_of(requested, os.environ)
    address = metrics_server.address(requested) if ranks.is_main else None
    state = functools.partial(progress.state, requested)
    attention.disable_cudnn()
    with metrics_server.serving(address, state):
        job.run(requested, ranks=ranks, stop=stop, progress=progress, access=access)


def _record(
    reason: Failure,
    requested: TuningJob | None,
    ranks: Ranks,
    *,
    progress: JobProgress,
    termination_log: Path | None,
) -> None:
    """Write the failure record, for a parent process, and the termination log, for a pod without one."""
    phase, step = progress.phase, progress.throughput.step
    if requested is not None:
        failure.write_record(OutputPaths(requested.output.folder).failure(ranks.rank), reason, phase, step)
    if termination_log is not None:
        failure.write_termination_log_once(failure.describe(reason, phase, step), termination_log)


def read_resolved(path: Path, environ: Mapping[str, str]) -> TuningJob:
    """Return the job that the parent process wrote to `path`; its hub token comes from the environment."""
    try:
        given = parse(TuningJob, json.loads(read_text(path)), str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} (line {error.lineno})") from None
    token = environ.get("HF_TOKEN")
    return given.model_copy(update={"hub_token": SecretStr(token) if token else None})
