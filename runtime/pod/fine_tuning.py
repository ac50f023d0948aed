"""`accelerate launch … fine_tuning.py`: the tuning job that a controller's mounts describe.

With one process, accelerate only starts this one, and the job runs as under `runtime tune`. With several,
accelerate is a torchrun that has started already, and each process is one rank. Start at `main`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime import logs
from runtime.pod.termination import exit_status_of
from runtime.tuning.process import failure
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.workspace import load_job, runs

log = logging.getLogger(__name__)


def main(arguments: Sequence[str], environ: Mapping[str, str], *, root: Path = Path("/")) -> int:
    """Run the tuning job that the mounts below `root` describe; return the exit status.

    `arguments` have no effect: some controllers pass those of the inference server, too.
    """
    termination_log = failure.termination_log(root)
    ranks = Ranks.read(environ)
    if ranks.world_size > 1:
        from runtime.tuning import worker

        return worker.work(lambda: _job(arguments, environ, root), termination_log=termination_log)
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")
    return exit_status_of(
        lambda: _launch(arguments, environ, root), phase="start", termination_log=termination_log
    )


def _launch(arguments: Sequence[str], environ: Mapping[str, str], root: Path) -> None:
    from runtime.tuning import launcher, publish

    job = _job(arguments, environ, root)
    termination_log = failure.termination_log(root)
    access = publish.access_of(job, environ)
    # accelerate's flags name one process; by default the launcher starts one for every GPU that it sees.
    launcher.run(job, processes=1, access=access, termination_log=termination_log)


def _job(arguments: Sequence[str], environ: Mapping[str, str], root: Path) -> TuningJob:
    if arguments:
        log.info("ignored flags: %s", " ".join(arguments))
    resolved = runs.place(load_job(None, environ=environ, root=root))
    resolved.warn()
    return resolved.ready()
