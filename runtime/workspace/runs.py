"""The name of a run, its folder where none is given, and an earlier run that is to be continued.

A run is called after its data and the time, as in tickets-20261130-1132. The same command continues a run
that was interrupted, and publishes again one whose image may be missing; else it begins a new one. Start at
`place`.
"""

import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from runtime.config import parse
from runtime.errors import ConfigError
from runtime.tuning import identity
from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import TuningJob
from runtime.workspace.layers import Resolved

FOLDER = Path("results")
"""Where runs lie, in the working directory."""


def place(resolved: Resolved[TuningJob], *, nodes: int = 1) -> Resolved[TuningJob]:
    """Return the job with the name of its run, in a folder of that name where none was given.

    A name that the user gave stays, and so does its folder: what is in it decides whether the run goes on.
    The nodes of one job must find the same folder again, whatever their clocks say: with several it keeps
    the job's name.
    """
    job = resolved.config
    run, sources = job.run or f"{job.name}-{time.strftime('%Y%m%d-%H%M')}", dict(resolved.sources)
    folder = job.output.folder
    free = folder.parent == FOLDER and sources["output.folder"] == "default"
    if not job.run:
        sources["run"] = "its name and the time"
    if free and job.run:
        folder, sources["output.folder"] = FOLDER / slug(run), "default: the run's name"
    elif free and nodes == 1:
        continued = earlier(job)
        folder = continued or _new(FOLDER / run)
        run, sources["output.folder"] = folder.name, "default: the run's name"
        if continued is not None:
            sources["run"] = sources["output.folder"] = "an earlier run of this job, continued"
    placed = job.output.model_copy(update={"folder": folder})
    job = job.model_copy(update={"run": run, "output": placed, "sources": sources})
    return replace(resolved, config=job, sources=sources)


def slug(name: str) -> str:
    """Return `name` with only the characters that are safe in one part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip(".-") or "job"


def data_name(word: str) -> str:
    """Return what the data of `--data` is called: by its file, its folder, its address or its image."""
    if "://" in word:
        word = unquote(urlsplit(word).path)
    word = word.removeprefix("oci:")
    last = Path(word).expanduser().resolve().name
    return last.partition(":")[0].partition(".")[0]


def earlier(job: TuningJob) -> Path | None:
    """Return the folder of the newest run of the same job that is to be continued, None where there is none.

    That is one without an adapter yet, or one whose adapter is to be pushed: publishing again is harmless.
    """
    wanted = _asked(job)
    for folder in sorted(FOLDER.glob("*"), key=_started, reverse=True):
        known = _job(OutputPaths(folder))
        if known is None or _asked(known) != wanted or known.output.image != job.output.image:
            continue
        if job.output.image or not OutputPaths(folder).sentinel.is_file():
            return folder
    return None


def _new(folder: Path) -> Path:
    """Return `folder`, or one called after it where it is there: several runs may begin in one minute."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain((folder,), names) if not name.exists())


def _asked(job: TuningJob) -> tuple[object, ...]:
    """Return what decides the job's bytes without reading data or weights; the job itself compares those."""
    data = identity.addresses(job.data) or (job.data.folder, job.data.file)
    return identity.decisive_settings(job), data, job.model.path, job.model.name


def _started(folder: Path) -> float:
    written = OutputPaths(folder).job
    return written.stat().st_mtime if written.is_file() else 0.0


def _job(paths: OutputPaths) -> TuningJob | None:
    """Return the job that was run in a folder; None where there was none, or another version's."""
    try:
        return parse(TuningJob, json.loads(paths.job.read_text(encoding="utf-8")), str(paths.job))
    except (OSError, ValueError, ConfigError):
        return None
