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
from dataclasses import replace
from pathlib import Path

from runtime import oci
from runtime.errors import Failure, RegistryError
from runtime.files import sha256, sync_directory, write_atomic
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob

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
    write_atomic(folder / MANIFEST, json.dumps(digests, indent=1))
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


PIECE_BYTES = 32 * 2**20
"""How much of a file travels at once."""


def collect(checkpoint: Path, ranks: Ranks) -> None:
    """Bring what each rank wrote of `checkpoint` (its random state) to rank 0, before it is sealed there."""
    own = checkpoint / f"rng_state_{ranks.rank}.pth"
    for rank, content in enumerate(ranks.gathered(own.read_bytes() if own.is_file() else b"")):
        target = checkpoint / f"rng_state_{rank}.pth"
        if content and not target.exists():
            target.write_bytes(content)
    ranks.wait()
    if ranks.leads and not (checkpoint / "trainer_state.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)  # another disk than rank 0's: a stub


def agreed(folder: Path, ranks: Ranks) -> Path | None:
    """Return the newest whole checkpoint that rank 0 has below `folder`, once every node has it too."""
    chosen = newest(folder) if ranks.first else None
    name, digest = ranks.told((chosen.name, sha256(chosen / MANIFEST)) if chosen else ("", ""))
    if not name:
        return None
    target = folder / name
    lacking = ranks.leads and not _is_same(target, digest)
    if any(ranks.told(ranks.gathered(lacking))):
        if lacking:
            log.info("%s comes from rank 0", name)
            for old in listed(folder):
                shutil.rmtree(old)
        _give_out(target, ranks, lacking=lacking)
    return target


def _is_same(checkpoint: Path, digest: str) -> bool:
    manifest = checkpoint / MANIFEST
    return manifest.is_file() and sha256(manifest) == digest and fault(checkpoint) is None


def _give_out(checkpoint: Path, ranks: Ranks, *, lacking: bool) -> None:
    """Send all files of rank 0's `checkpoint`, the manifest last; who is `lacking` writes them."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file()) if ranks.first else []
    found.sort(key=lambda path: path.name == MANIFEST)
    for name in ranks.told([str(path.relative_to(checkpoint)) for path in found]):
        target = checkpoint / name
        source = target.open("rb") if ranks.first else None
        if lacking:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
        while piece := ranks.told(source.read(PIECE_BYTES) if source else b""):
            if lacking:
                with target.open("ab") as stream:
                    stream.write(piece)
        if source:
            source.close()
    ranks.wait()


_ATTEMPTS = 3
"""Tries of a request: after SIGTERM there are some 28 s in all."""


class RegistryCheckpoints:
    """The checkpoints of one job under one image reference; used by rank 0 alone."""

    def __init__(self, reference: oci.Reference, access: oci.Access, *, keep: bool):
        self._reference, self._keep = reference, keep
        self._access = replace(access, attempts=_ATTEMPTS)
        self._mark = ""

    def restore(self, folder: Path, mark: str) -> None:
        """Bring the newest whole checkpoint of this job into `folder`, unless a later one lies there.

        mark: fingerprint of the job and its data; other jobs' checkpoints are not touched.
        """
        self._mark = mark
        local = newest(folder)
        for found in oci.checkpoints.find(self._reference, job=mark, access=self._access):
            if local is not None and found.step <= step_of(local):
                return
            target = folder / f"checkpoint-{found.step}"
            shutil.rmtree(target, ignore_errors=True)
            try:
                oci.pull(found.image, target, access=self._access)
                reason = fault(target)
            except RegistryError as error:
                reason = str(error)
            if reason is None:
                log.info("step %s brought back from %s", found.step, self._reference)
                return
            log.warning("checkpoint %s in %s is passed over: %s", found.step, self._reference, reason)
            shutil.rmtree(target, ignore_errors=True)

    def save(self, checkpoint: Path) -> None:
        """Push a sealed checkpoint; a failure is logged, not raised."""
        step = step_of(checkpoint)
        try:
            oci.checkpoints.push(checkpoint, self._reference, step=step, job=self._mark, access=self._access)
        except Failure as error:
            log.warning("checkpoint %s stays on this disk alone: %s", step, error)

    def clear(self) -> None:
        """Remove the checkpoints after success, unless they are to be kept."""
        if self._keep:
            return
        try:
            oci.checkpoints.delete(self._reference, access=self._access)
        except Failure as error:
            log.warning("checkpoints in %s stay: %s", self._reference, error)


def of(job: TuningJob, access: oci.Access) -> RegistryCheckpoints | None:
    """Return the registry side of the job's checkpoints, None when it names no image for them."""
    if job.output.checkpoint_image is None:
        return None
    reference = oci.parse(job.output.checkpoint_image)
    return RegistryCheckpoints(reference, access, keep=job.output.keep_checkpoint_image)
