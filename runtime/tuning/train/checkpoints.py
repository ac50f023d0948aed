"""Checkpoints on the disk of one node, which are complete or ignored.

transformers writes a checkpoint file by file and its resume takes the highest number, complete or not. Here
a manifest with the sha256 of every file is written last, after fsync; a directory without one, or with a
file that differs, is not a checkpoint. Which job they are of stands beside them. Copies on other nodes and in
a registry are checkpoint_sync.py. Start at `claim` and `newest`, then `seal`.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path

from runtime.files import sha256, sync_directory, write_atomic
from runtime.tuning.identity import JobIdentity, in_words

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Holds the sha256 of all other files by name; written once they are on the disk."""

OWNER = "job.json"
"""Beside the checkpoints: the identity of their job."""

_NAME = re.compile(r"checkpoint-(\d+)$")

_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""Files without which a run cannot go on as if it had not been interrupted."""


def claim(folder: Path, owner: JobIdentity, *, history: Path | None = None) -> None:
    """Make `folder` the place of `owner`'s checkpoints, with the `history` of metrics that belongs to them.

    Checkpoints of another job are moved to a folder beside it, and those of `owner` that were moved there
    earlier are moved back. Called by one process of each disk.
    """
    known = JobIdentity.read(folder / OWNER)
    if listed(folder) and (known is None or known.digest != owner.digest):
        _set_aside(folder, known, owner, history)
    own = _aside(folder, owner.digest)
    if own.is_dir() and not listed(folder):
        shutil.rmtree(folder, ignore_errors=True)
        own.rename(folder)
        if history is not None and (folder / history.name).is_file():
            (folder / history.name).replace(history)
        log.info("the checkpoints of this job are back from %s", own)
    write_atomic(folder / OWNER, owner.to_json())


def _set_aside(folder: Path, known: JobIdentity | None, owner: JobIdentity, history: Path | None) -> None:
    """Move the checkpoints of the job `known` out of `owner`'s way, and say where they are."""
    found = listed(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    why = in_words(owner.differences(known)) if known else "which one is not recorded"
    if history is not None and history.is_file():
        history.replace(folder / history.name)
    first = target = _aside(folder, known.digest if known else "unknown")
    for number in itertools.count(2):
        if not target.exists():
            break
        target = first.with_name(f"{first.name}.{number}")
    folder.rename(target)
    log.warning(
        "the checkpoints in %s are another job's (%s): moved to %s (%d checkpoints up to step %d, %.1f MiB), "
        "which nothing deletes; starting from the beginning",
        folder, why, target, len(found), step_of(found[-1]), size / 2**20,
    )  # fmt: skip


def _aside(folder: Path, digest: str) -> Path:
    return folder.with_name(f"{folder.name}-of-{digest[:12]}")


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint below `folder` to resume from; why newer ones are not, is logged."""
    for path in reversed(listed(folder)):
        reason = fault(path) or _missing_state(path)
        if reason is None:
            return path
        log.warning("skipping %s: %s", path.name, reason)
    return None


def listed(folder: Path) -> list[Path]:
    """Return all checkpoint directories below `folder`, oldest first, complete or not."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.is_dir() and _NAME.match(path.name)]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """Return the optimizer step that the checkpoint directory `path` was taken after."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else 0


def fault(folder: Path) -> str | None:
    """Return why `folder` is not a complete checkpoint, or None when it is one."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not finished"
    except (ValueError, OSError):
        return "its manifest cannot be read"
    if not isinstance(digests, dict) or not digests:
        return "its manifest lists nothing"
    for name, expected in digests.items():
        try:
            actual = sha256(folder / name)
        except OSError:
            return f"{name} is missing"
        if actual != expected:
            return f"{name} is damaged"
    return None


def _missing_state(folder: Path) -> str | None:
    """Return why a complete checkpoint is nothing to resume from, or None."""
    missing = [name for name in _NEEDED if not (folder / name).exists()]
    return f"it holds weights only ({', '.join(missing)} missing)" if missing else None


def seal(folder: Path) -> None:
    """Flush every file of the checkpoint in `folder` to the disk, then write its manifest."""
    digests: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as stream:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
    write_atomic(folder / MANIFEST, json.dumps(digests, indent=1))
    sync_directory(folder)


def prune(folder: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest checkpoints (None: keep all). Called after `seal`, never before."""
    if keep is None:
        return
    for path in listed(folder)[: -max(keep, 1)]:
        (path / MANIFEST).unlink(missing_ok=True)  # an interrupted removal leaves no partial checkpoint
        shutil.rmtree(path, ignore_errors=True)


def remove_unsealed(folder: Path) -> None:
    """Remove the checkpoint directories below `folder` that were never sealed: they only take space."""
    for path in listed(folder):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
