"""Why a process of a job ended, as one JSON object in a file.

torchrun exits with 1 whatever its workers failed of; each worker writes a failure record, and the parent
combines them into one. Knows the error tree and files, not processes. Start at `write_record` and `combine`.
"""

import errno
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import errors
from runtime.errors import Failure, StoppedError, one_line
from runtime.files import write_atomic
from runtime.redaction import redact

log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")
"""Kubernetes shows its content as the reason of a container's end, up to 4096 bytes."""

RENDEZVOUS_FAILED = 75
"""torchrun's exit status here when other nodes did not join, or left before the workers began."""

_DISK_FULL = ("os error 28", "PytorchStreamWriter failed", "inline_container.cc")
"""In the texts of safetensors' and torch's errors for a full disk, which are not an OSError."""

KINDS = {kind.__name__: kind for kind in errors.EXIT_CODES}


def as_failure(error: BaseException) -> Failure:
    """Return `error` as a Failure: itself, a full disk or memory, or an unforeseen one."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return errors.CapacityError(f"no space left on the disk of {error.filename or 'the output folder'}")
    if any(text in str(error) for text in _DISK_FULL):
        return errors.CapacityError(
            "no space left on the disk of the output folder while a checkpoint or the adapter was written; "
            "free some, or lower save_total_limit; the same command resumes from the last checkpoint"
        )
    if errors.is_out_of_memory(error):
        return errors.CapacityError(
            "out of memory; lower max_length or per_device_train_batch_size, or quantise to 4 bits"
        )
    return Failure(f"{type(error).__name__}: {one_line(error, 500)}")


def describe(failure: Failure, phase: str, step: int) -> dict[str, Any]:
    """Return the JSON object for `failure`, which happened in `phase` after `step` optimizer steps."""
    return {
        "phase": phase,
        "code": errors.exit_code(failure),
        "message": redact(str(failure))[:2000],
        "step": step,
        "retriable": type(failure) in errors.RETRIABLE,
        "kind": type(failure).__name__,
        "time": time.time(),
    }


def write_record(path: Path, failure: Failure, phase: str, step: int) -> None:
    """Write why this process ends; an unwritable disk is only logged, so that it hides no failure."""
    try:
        write_atomic(path, json.dumps(describe(failure, phase, step)) + "\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the workers' records, oldest first."""
    records: list[dict[str, Any]] = []
    for path in paths:
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return sorted(records, key=lambda entry: float(entry.get("time", 0)))


def combine(records: Sequence[dict[str, Any]], *, stop_requested: bool, status: int) -> dict[str, Any]:
    """Return the one record that explains why all workers ended.

    torchrun ends the others with SIGTERM when one fails, so "stopped" is the reason only after
    `stop_requested`. `status` is torchrun's, for a worker that could not write a record.
    """
    failures = [record for record in records if record["kind"] != StoppedError.__name__]
    if failures and not (stop_requested and _follow_from_stop(failures)):
        return failures[0]
    if stop_requested and records:
        return next(record for record in records if record["kind"] == StoppedError.__name__)
    if stop_requested:
        stopped = StoppedError(
            "stopped without a new checkpoint: training had not begun, or its step did not end in the time "
            "there was; run the same command again"
        )
        return describe(stopped, "start", 0)
    if status == RENDEZVOUS_FAILED:
        incomplete = errors.TransientError(
            "rendezvous failed: not all nodes of this job joined; run the same command on all of them"
        )
        return describe(incomplete, "start", 0)
    killed = Failure(
        f"a training process ended without a failure record (torchrun exited with {status}; killed, or "
        "out of memory?); run the same command again to resume from the last checkpoint"
    )
    step = max((int(record.get("step", 0)) for record in records), default=0)
    return describe(killed, "train", step)


def _follow_from_stop(failures: Sequence[dict[str, Any]]) -> bool:
    """Whether all are of ranks that lost their peers in a collective while the job was stopping."""
    return all(record["kind"] == Failure.__name__ for record in failures)


def from_record(record: dict[str, Any]) -> Failure:
    """Return the failure that `record` describes."""
    return KINDS.get(str(record["kind"]), Failure)(record["message"])


def termination_log(root: Path) -> Path:
    """Return the termination log of a pod whose files are below `root`."""
    return root / TERMINATION_LOG.relative_to("/")


def write_termination_log_once(record: dict[str, Any], path: Path) -> None:
    """Write `record` to an empty termination log: the first writer is closest to the cause."""
    if path.is_file() and path.stat().st_size == 0:
        write_termination_log(record, path)


def write_termination_log(record: dict[str, Any], path: Path = TERMINATION_LOG) -> None:
    """Write `record` where Kubernetes shows it, when that file exists and is writable."""
    shown = {key: record[key] for key in ("phase", "code", "message", "step", "retriable")}
    try:
        if path.exists():
            path.write_text(json.dumps(shown, ensure_ascii=False)[:4096] + "\n", encoding="utf-8")
    except OSError:
        log.debug("%s is not writable", path)
