"""The files of one job's output folder, and which of them mark it as done.

The adapter, the report and the sentinel are directly in the folder, where KAITO's pusher looks for them;
everything else is below `.work`. Knows names, not contents. Start at `OutputPaths`.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from runtime import packing
from runtime.files import write_atomic
from runtime.tuning.settings import TuningJob

SENTINEL = "fine_tuning_completed.txt"
"""KAITO's pusher waits for this file, then uploads the files beside it."""

WITHOUT_EFFECT = {
    "name",
    "run",
    "output",
    "checkpoint_minutes",
    "metrics_host",
    "metrics_port",
    "parallel",
    "sources",
}
"""Settings that do not change the adapter's bytes."""


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
        return self.folder / packing.WORK

    @property
    def job(self) -> Path:
        """The resolved job, as the workers read it."""
        return self.work / "job.json"

    @property
    def finished(self) -> Path:
        """Fingerprint of the job that made the adapter in the folder."""
        return self.work / "finished"

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


def fingerprint(job: TuningJob, data: str = "") -> str:
    """Return the sha256 of all that decides the adapter's bytes; `data` is the digest of its files."""
    decisive = job.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    text = json.dumps([decisive, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(job: TuningJob, *, with_adapter: bool = True) -> bool:
    """Return whether the output folder already holds this job's finished adapter.

    Nodes other than the first have no adapter: without `with_adapter`, that the job is finished is enough.
    """
    paths = OutputPaths(job.output.folder)
    if not paths.finished.is_file() or (with_adapter and not paths.sentinel.is_file()):
        return False
    return paths.finished.read_text(encoding="utf-8").strip() == fingerprint(job)


def mark_finished(job: TuningJob) -> None:
    """Write the fingerprint of the finished job."""
    write_atomic(OutputPaths(job.output.folder).finished, fingerprint(job) + "\n")


def mark_done(job: TuningJob) -> None:
    """Write the last files: the finished job's fingerprint, then the sentinel that a pusher waits for."""
    mark_finished(job)
    stamp = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    write_atomic(OutputPaths(job.output.folder).sentinel, f"Fine-Tuning completed at {stamp}\n")
