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

from runtime import logs
from runtime.config import parse, read_text
from runtime.errors import ConfigError, Failure, StoppedError, exit_code
from runtime.tuning import job, loggers, publish
from runtime.tuning.output import OutputPaths
from runtime.tuning.process import failure
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal, end_with_parent
from runtime.tuning.report import metrics_server
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.setup import JobProgress

log = logging.getLogger("runtime.tuning")


def work(read: Callable[[], TuningJob], *, termination_log: Path | None = None) -> int:
    """Run one rank of the job that `read` returns; return the exit code, or end the process with it.

    `termination_log` is where the first rank to fail says why, in a pod without a parent that would.
    """
    debug = os.environ.get("DEBUG_MODE", "").lower() == "true"
    ranks = Ranks.read(os.environ)
    logs.configure(debug=debug, rank=ranks.rank)
    end_with_parent()
    stop, course = StopSignal(), JobProgress()
    stop.install()
    asked: TuningJob | None = None
    try:
        asked = read()
        loggers.check(asked.training)
        for name, value in loggers.places(asked.output.folder).items():
            os.environ.setdefault(name, value)
        access = publish.access_of(asked, os.environ)
        port = asked.metrics_port and asked.metrics_port + ranks.local_rank
        with metrics_server.serving(port if ranks.first else None, functools.partial(course.state, asked)):
            job.run(asked, ranks=ranks, stop=stop, course=course, access=access)
    except Exception as error:  # the process's edge: whatever ended the rank is recorded
        reason = failure.as_failure(error)
        if asked is not None:
            record = OutputPaths(asked.output.folder).failure(ranks.rank)
            failure.record(record, reason, course.phase, course.meter.step)
        if termination_log is not None:
            failure.tell_first(failure.describe(reason, course.phase, course.meter.step), termination_log)
        foreseen, stopped = isinstance(error, Failure), isinstance(error, StoppedError)
        log.log(
            logging.INFO if stopped else logging.ERROR,
            "rank %d: %s",
            ranks.rank,
            reason,
            exc_info=None if foreseen and not debug else error,
        )
        # Peers may be waiting in a collective that this rank will never join: leave without a farewell.
        logging.shutdown()
        os._exit(exit_code(reason))
    ranks.leave()
    return 0


def read_resolved(path: Path, environ: Mapping[str, str]) -> TuningJob:
    """Return the job that the parent process wrote to `path`; its hub token comes by the environment."""
    try:
        given = parse(TuningJob, json.loads(read_text(path)), str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} (line {error.lineno})") from None
    token = environ.get("HF_TOKEN")
    return given.model_copy(update={"hub_token": SecretStr(token) if token else None})
