"""Checkpoints that are whole or ignored.

transformers writes a checkpoint file by file and its resume takes the highest number, whole or not. Here
a manifest with the sha256 of every file is written last, after fsync; a directory without one, or with a
file that differs, is not a checkpoint. Does not know what is in the files. Start at `newest`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from runtime.files import sha256, sync_directory, write_whole

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Name to sha256 of all other files, written when they are on the disk."""

_NAME = re.compile(r"checkpoint-(\d+)$")


def seal(folder: Path) -> None:
    """Bring every file of the checkpoint in `folder` to the disk, then write its manifest."""
    digests: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as stream:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
    write_whole(folder / MANIFEST, json.dumps(digests, indent=1))
    sync_directory(folder)


def fault(folder: Path) -> str | None:
    """Return why `folder` is no whole checkpoint, or None when it is one."""
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


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint below `folder`; says in the log which newer ones it passed over."""
    for path in reversed(listed(folder)):
        reason = fault(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path.name, reason)
    return None


def listed(folder: Path) -> list[Path]:
    """Return all checkpoint directories below `folder`, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the optimizer step that the checkpoint directory `path` was taken after."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else 0


def prune(folder: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest checkpoints (None: keep all). Called after `seal`, never before."""
    if keep is None:
        return
    for path in listed(folder)[: -max(keep, 1)]:
        (path / MANIFEST).unlink(missing_ok=True)  # so that a removal cut short leaves no half checkpoint
        shutil.rmtree(path, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what lies below `folder` under a checkpoint's name and was never sealed: it only takes space."""
    for path in listed(folder):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
