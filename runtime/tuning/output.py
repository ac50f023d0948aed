"""The files of one job's output folder, and which of them say that it is done.

The adapter, the report and the sentinel lie directly in the folder, where KAITO's pusher looks for them;
everything else below `.work`. Knows names, not contents. Start at `OutputPaths`.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.files import write_atomic
from runtime.tuning.settings import TuningJob

SENTINEL = "fine_tuning_completed.txt"
"""KAITO's pusher waits for this file, then uploads what is beside it."""

WITHOUT_EFFECT = {"name", "output", "checkpoint_minutes", "metrics_port", "parallel", "sources"}
"""Settings that do not change the adapter's bytes."""


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """Where a job's files are, given its output folder."""

    folder: Path

    @property
    def sentinel(self) -> Path:
        return self.folder / SENTINEL

    @property
    def report(self) -> Path:
        return self.folder / "tuning_report.json"

    @property
    def page(self) -> Path:
        """The report as people open it."""
        return self.folder / "report.html"

    @property
    def work(self) -> Path:
        return self.folder / ".work"

    @property
    def job(self) -> Path:
        """The resolved job, as the workers read it."""
        return self.work / "job.json"

    @property
    def finished(self) -> Path:
        """Fingerprint of the job that the adapter in the folder came from."""
        return self.work / "finished"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def history(self) -> Path:
        """One JSON object for every logged step."""
        return self.work / "history.jsonl"

    def lock(self, node: int) -> Path:
        """Held by the processes of a node while they work here; a folder may be shared by several nodes."""
        return self.work / f"lock-{node}"

    def failure(self, rank: int) -> Path:
        """Why `rank` ended, for the parent process: torchrun itself only says 1."""
        return self.work / f"failure-{rank}.json"


def fingerprint(job: TuningJob, data: str = "") -> str:
    """Return the sha256 of all that decides the adapter's bytes; `data` adds the digests of its files."""
    decisive = job.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    text = json.dumps([decisive, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(job: TuningJob, *, with_adapter: bool = True) -> bool:
    """Return whether the output folder already holds this very job's adapter, whole.

    Nodes other than the first have none: without `with_adapter` it is enough that the job was finished.
    """
    places = OutputPaths(job.output.folder)
    if not places.finished.is_file() or (with_adapter and not places.sentinel.is_file()):
        return False
    return places.finished.read_text(encoding="utf-8").strip() == fingerprint(job)


def mark_finished(job: TuningJob) -> None:
    """Write which job is finished."""
    places = OutputPaths(job.output.folder)
    write_atomic(places.finished, fingerprint(job) + "\n")


def mark_done(job: TuningJob) -> None:
    """Write, as the very last files, which job is finished and the sentinel that a pusher waits for."""
    mark_finished(job)
    stamp = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    write_atomic(OutputPaths(job.output.folder).sentinel, f"Fine-Tuning completed at {stamp}\n")
