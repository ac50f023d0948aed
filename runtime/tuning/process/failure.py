"""Why a process of a job ended, as one JSON object that outlives it.

torchrun answers 1 whatever its workers died of; each worker leaves a file, and the parent makes one
failure of them. Knows the error tree and files, not processes. Start at `record` and `of_workers`.
"""

import errno
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import errors
from runtime.errors import Failure, StoppedError
from runtime.files import write_atomic
from runtime.logs import redact

log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")
"""Kubernetes shows what stands here as the reason of a container's end, up to 4096 bytes."""

NOT_MET = 75
"""torchrun's exit status here when other nodes did not come, or went before the workers began."""

_DISK_FULL = ("os error 28", "PytorchStreamWriter failed", "inline_container.cc")
"""In the texts of safetensors' and torch's errors, which are no OSError."""

KINDS = {kind.__name__: kind for kind in errors.EXIT_CODES}


def as_failure(error: BaseException) -> Failure:
    """Return `error` as a Failure: itself, what a full disk or memory means, or one nobody foresaw."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return errors.CapacityError(f"no space left on the disk of {error.filename or 'the output folder'}")
    if any(sign in str(error) for sign in _DISK_FULL):
        return errors.CapacityError(
            "no space left on the disk of the output folder while a checkpoint or the adapter was written; "
            "free some, or lower save_total_limit; the same command goes on from the last checkpoint"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return errors.CapacityError(
            "out of memory; lower max_length or per_device_train_batch_size, or quantise to 4 bits"
        )
    return Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


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


def record(path: Path, failure: Failure, phase: str, step: int) -> None:
    """Write why this process ends; a disk that is full or gone does not hide the failure itself."""
    try:
        write_atomic(path, json.dumps(describe(failure, phase, step)) + "\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what the workers recorded, first failure first."""
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda entry: float(entry.get("time", 0)))


def of_workers(recorded: Sequence[dict[str, Any]], *, asked: bool, status: int) -> dict[str, Any]:
    """Return the one record that explains why all workers ended.

    torchrun ends the others with SIGTERM when one fails, so "stopped" is the reason only when this job
    was `asked` to stop. `status` is torchrun's, for a worker that could record nothing.
    """
    reasons = [entry for entry in recorded if entry["kind"] != StoppedError.__name__]
    if reasons and not (asked and _only_aftermath(reasons)):
        return reasons[0]
    if asked and recorded:
        return next(entry for entry in recorded if entry["kind"] == StoppedError.__name__)
    if asked:
        stopped = StoppedError(
            "stopped before training began or a checkpoint was due; run the same command again"
        )
        return describe(stopped, "start", 0)
    if status == NOT_MET:
        apart = errors.TransientError(
            "the nodes of this job did not meet; run the same command on all of them"
        )
        return describe(apart, "start", 0)
    died = Failure(
        f"a training process died without a word (torchrun ended with {status}; killed, or out of memory?); "
        "run the same command again to go on from the last checkpoint"
    )
    step = max((int(entry.get("step", 0)) for entry in recorded), default=0)
    return describe(died, "train", step)


def _only_aftermath(reasons: Sequence[dict[str, Any]]) -> bool:
    """Ranks that lose their peers while all are stopping fail in a collective: that is no reason."""
    return all(entry["kind"] == Failure.__name__ for entry in reasons)


def from_record(entry: dict[str, Any]) -> Failure:
    """Return the failure that `entry` describes."""
    return KINDS.get(str(entry["kind"]), Failure)(entry["message"])


def termination_log(root: Path) -> Path:
    """Return the termination log of a pod whose files lie below `root`."""
    return root / TERMINATION_LOG.relative_to("/")


def tell_first(entry: dict[str, Any], path: Path) -> None:
    """Write `entry` as `tell` does, unless something stands there: who came first knows better."""
    if path.is_file() and path.stat().st_size == 0:
        tell(entry, path)


def tell(entry: dict[str, Any], path: Path = TERMINATION_LOG) -> None:
    """Write `entry` where Kubernetes shows it, when that file is there and writable."""
    shown = {key: entry[key] for key in ("phase", "code", "message", "step", "retriable")}
    try:
        if path.exists():
            path.write_text(json.dumps(shown, ensure_ascii=False)[:4096] + "\n", encoding="utf-8")
    except OSError:
        log.debug("%s is not writable", path)
