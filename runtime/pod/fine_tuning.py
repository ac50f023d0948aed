"""`accelerate launch … fine_tuning.py`: the tuning job that a controller's mounts describe.

With one process, accelerate only starts this, and the job runs as under `runtime tune`. With several it
is a torchrun that has started already, and each process is one rank. Start at `main`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime import logs
from runtime.pod.ending import status_of
from runtime.tuning.process import failure
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.workspace import load_job

log = logging.getLogger(__name__)


def main(arguments: Sequence[str], environ: Mapping[str, str], *, root: Path = Path("/")) -> int:
    """Tune as the mounts below `root` say; return the exit status.

    `arguments` have no meaning: some controllers send those of the inference server along.
    """
    termination_log = failure.termination_log(root)
    ranks = Ranks.read(environ)
    if ranks.world > 1:
        from runtime.tuning.process import worker

        return worker.work(lambda: _job(arguments, environ, root), termination_log=termination_log)
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")
    return status_of(
        lambda: _launch(arguments, environ, root), phase="start", termination_log=termination_log
    )


def _launch(arguments: Sequence[str], environ: Mapping[str, str], root: Path) -> None:
    from runtime.tuning import publish
    from runtime.tuning.process import launcher

    job = _job(arguments, environ, root)
    place = failure.termination_log(root)
    # accelerate asked for one process: torchrun would take every GPU it sees.
    launcher.run(job, processes=1, access=publish.access_of(job, environ), termination_log=place)


def _job(arguments: Sequence[str], environ: Mapping[str, str], root: Path) -> TuningJob:
    if arguments:
        log.info("flags without meaning here: %s", " ".join(arguments))
    resolved = load_job(None, environ=environ, root=root)
    resolved.warn()
    return resolved.ready()
