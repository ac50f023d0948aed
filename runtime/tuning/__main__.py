"""`torchrun --nproc-per-node N -m runtime.tuning FILE`: one worker of a tuning job.

FILE is a resolved job (JSON, written by the parent process) or a Workspace manifest. The process ends
with the exit code of errors.py and leaves its reason in the output folder.

An entry point, above the packages that it joins; no module imports it.
"""

import os
import sys
from pathlib import Path

from runtime import garbage_collection
from runtime.errors import ConfigError
from runtime.tuning import worker
from runtime.tuning.settings import TuningJob


def main(arguments: list[str]) -> int:
    """Run one rank of the job in the file that `arguments` name; return the exit code."""
    return worker.work(lambda: _read(arguments))


def _read(arguments: list[str]) -> TuningJob:
    if len(arguments) != 1:
        raise ConfigError("usage: python -m runtime.tuning FILE (a resolved job or a Workspace manifest)")
    path = Path(arguments[0])
    if path.suffix == ".json":
        return worker.read_resolved(path, os.environ)
    from runtime.workspace import load_job

    return load_job(path, environ=os.environ).ready()


if __name__ == "__main__":
    garbage_collection.exit_without(main(sys.argv[1:]))
