"""Checkpoints on the disk of one node, which are complete or ignored.

transformers writes a checkpoint file by file and its resume takes the highest number, complete or not. Here
a manifest with the sha256 of every file is written last, after fsync; a directory without one, or with a
file that differs, is not a checkpoint. Does not know what is in the files; copies on other nodes and in a
registry are checkpoint_sync.py. Start at `newest`, then `seal`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from runtime.files import sha256, sync_directory, write_atomic

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Holds the sha256 of all other files by name; written once they are on the disk."""

_NAME = re.compile(r"checkpoint-(\d+)$")


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint below `folder`; newer ones that are not are logged."""
    for path in reversed(listed(folder)):
        reason = fault(path)
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
