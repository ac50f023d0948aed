"""One worker of a tuning job: `torchrun --nproc-per-node N -m runtime.tuning FILE`.

FILE is a resolved job (JSON, written by the parent process) or a Workspace manifest. The process ends
with the exit code of errors.py and leaves its reason in the output folder. Start at `main`.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from runtime import logs, process
from runtime.config import parse, read_text
from runtime.errors import ConfigError, Failure, StoppedError, exit_code
from runtime.tuning import failure, job, live, loggers, publish
from runtime.tuning.bench import Course
from runtime.tuning.places import Places
from runtime.tuning.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.tuning.stop import StopSignal, end_with_parent

log = logging.getLogger("runtime.tuning")


def main(arguments: list[str]) -> int:
    """Run one rank of the job in the file that `arguments` name; return the exit code."""
    return work(lambda: _read(arguments))


def work(read: Callable[[], TuningJob], *, termination_log: Path | None = None) -> int:
    """Run one rank of the job that `read` returns; return the exit code, or end the process with it.

    `termination_log` is where the first rank to fail says why, in a pod without a parent that would.
    """
    debug = os.environ.get("DEBUG_MODE", "").lower() == "true"
    ranks = Ranks.read(os.environ)
    logs.configure(debug=debug, rank=ranks.rank)
    end_with_parent()
    stop, course = StopSignal(), Course()
    stop.install()
    asked: TuningJob | None = None
    try:
        asked = read()
        loggers.check(asked.training)
        for name, value in loggers.places(asked.output.folder).items():
            os.environ.setdefault(name, value)
        access = publish.access_of(asked, os.environ)
        port = asked.metrics_port and asked.metrics_port + ranks.local_rank
        with live.serving(port if ranks.first else None, functools.partial(course.state, asked)):
            job.run(asked, ranks=ranks, stop=stop, course=course, access=access)
    except Exception as error:  # the process's edge: whatever ended the rank is recorded
        reason = failure.as_failure(error)
        if asked is not None:
            record = Places(asked.output.folder).failure(ranks.rank)
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


def _read(arguments: list[str]) -> TuningJob:
    if len(arguments) != 1:
        raise ConfigError("usage: python -m runtime.tuning FILE (a resolved job or a Workspace manifest)")
    path = Path(arguments[0])
    if path.suffix == ".json":
        given = parse_job(path)
        token = os.environ.get("HF_TOKEN")
        return given.model_copy(update={"hub_token": SecretStr(token) if token else None})
    from runtime.workspace import load_job

    return load_job(path, environ=os.environ).ready()


def parse_job(path: Path) -> TuningJob:
    """Return the resolved job in `path`."""
    import json

    try:
        return parse(TuningJob, json.loads(read_text(path)), str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} (line {error.lineno})") from None


if __name__ == "__main__":
    process.leave(main(sys.argv[1:]))
