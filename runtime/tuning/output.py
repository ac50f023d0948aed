"""The files of one job's output folder: which mark it as done, and whose adapter is in it.

The adapter, the report and the sentinel are directly in the folder, where KAITO's pusher looks for them;
everything else is below `.work`. Which job is which, identity.py knows. Start at `OutputPaths`, then
`check_replaceable` and `replacing`.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime import packing
from runtime.adapters import CONFIG_FILE, WEIGHTS_FILE
from runtime.errors import ConfigError
from runtime.files import atomic_files, write_atomic
from runtime.redaction import redact
from runtime.tuning import identity
from runtime.tuning.identity import JobIdentity
from runtime.tuning.settings import TuningJob

SENTINEL = "fine_tuning_completed.txt"
"""KAITO's pusher waits for this file, then uploads the files beside it."""


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """The paths of a job's files in its output folder."""

    folder: Path

    @property
    def sentinel(self) -> Path:
        return self.folder / SENTINEL

    @property
    def report(self) -> Path:
        return self.folder / packing.REPORT

    @property
    def page(self) -> Path:
        """The report as people open it."""
        return self.folder / packing.PAGE

    @property
    def work(self) -> Path:
        """What only this user may see: addresses of data hold credentials."""
        return self.folder / packing.WORK

    def make_work(self) -> Path:
        """Have the folder `work`, whoever made it."""
        self.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(PermissionError):  # another user's: what cannot be written is said elsewhere
            self.work.chmod(0o700)
        return self.work

    @property
    def job(self) -> Path:
        """The resolved job, as the workers read it."""
        return self.work / "job.json"

    @property
    def finished(self) -> Path:
        """Identity of the job that made the adapter in the folder, written when it is complete."""
        return self.work / "finished.json"

    @property
    def saving(self) -> Path:
        """Identity of the job whose adapter is being moved into the folder; gone when all of it is there."""
        return self.work / "saving.json"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def history(self) -> Path:
        """Metrics: one JSON object for every logged step."""
        return self.work / "history.jsonl"

    def lock(self, node: int) -> Path:
        """Held by the processes of a node while they run; a folder may be shared by several nodes."""
        return self.work / f"lock-{node}"

    def failure(self, rank: int) -> Path:
        """Why `rank` ended, for the parent process: torchrun itself only exits with 1."""
        return self.work / f"failure-{rank}.json"


def is_done(job: TuningJob, *, with_adapter: bool = True) -> bool:
    """Return whether the output folder already holds this job's finished adapter.

    Nodes other than the first have no adapter: without `with_adapter`, that the job is finished is enough.
    """
    paths = OutputPaths(job.output.folder)
    adapter = (paths.sentinel, paths.folder / WEIGHTS_FILE) if with_adapter else ()
    if not all(path.is_file() for path in (paths.finished, *adapter)):
        return False
    owner = JobIdentity.read(paths.finished)
    return owner is not None and not identity.requested(job).differences(owner)


def check_replaceable(job: TuningJob) -> None:
    """Raise ConfigError when the folder holds an adapter of another job, unless it may be replaced."""
    paths = OutputPaths(job.output.folder)
    if job.output.overwrite or paths.saving.is_file():  # the latter: half-written, and not finished
        return
    if not any((paths.folder / name).is_file() for name in (WEIGHTS_FILE, CONFIG_FILE)):
        return
    owner = JobIdentity.read(paths.finished)
    if owner is None:
        whose = "an adapter, and which job made it is not recorded"
    elif differences := identity.requested(job).differences(owner):
        whose = f"the finished adapter of another job ({identity.in_words(differences)})"
    else:
        return  # this job's, without its sentinel
    raise ConfigError(
        f"output folder {paths.folder} holds {whose}; name another --output, or --overwrite to replace it "
        "when this job is done"
    )


def mark_finished(job: TuningJob, owner: JobIdentity) -> None:
    """Record that the job `owner` is finished: on a node without an adapter, all there is to see of it."""
    write_atomic(OutputPaths(job.output.folder).finished, owner.to_json())


def write_job(path: Path, job: TuningJob) -> None:
    """Write a resolved job for the workers, for this user alone."""
    write_atomic(path, job.model_dump_json(indent=1), mode=0o600)


def forget(path: Path, job: TuningJob) -> None:
    """Leave the job in `path` without what its addresses hold of credentials: its processes have ended."""
    urls = tuple(map(redact, job.data.urls))
    with contextlib.suppress(OSError):  # the reason why the job ended is said, not this
        write_job(path, job.model_copy(update={"data": job.data.model_copy(update={"urls": urls})}))


@contextlib.contextmanager
def replacing(job: TuningJob, owner: JobIdentity) -> Iterator[Path]:
    """Yield a new folder whose files replace those of an earlier job when the block ends well.

    Until then nothing changes; then the record of the finished job is written, and the sentinel that a
    pusher waits for last of all.
    """
    paths = OutputPaths(job.output.folder)
    with atomic_files(paths.folder, last=WEIGHTS_FILE) as scratch:
        yield scratch
        write_atomic(paths.saving, owner.to_json())
        paths.sentinel.unlink(missing_ok=True)
        paths.finished.unlink(missing_ok=True)
        for name in packing.JOB_FILES:
            if not (scratch / name).exists():  # another tokenizer's, which an image would hold beside the new
                (paths.folder / name).unlink(missing_ok=True)
    mark_finished(job, owner)
    stamp = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    write_atomic(paths.sentinel, f"Fine-Tuning completed at {stamp}\n")
    paths.saving.unlink(missing_ok=True)
