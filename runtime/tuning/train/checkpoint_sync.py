"""Copies of checkpoints elsewhere: on the other nodes of a job, and under an image reference in a registry.

Nodes need not share a disk, and a node's disk need not outlive it. Local checkpoints are checkpoints.py.
Start at `sync_newest` (between nodes) and `RegistryCheckpoints`.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from runtime import oci
from runtime.errors import ConfigError, Failure, RegistryError
from runtime.files import sha256
from runtime.oci.checkpoints import Other, Run
from runtime.tuning import identity
from runtime.tuning.identity import JobIdentity
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.tuning.signing import signing_key
from runtime.tuning.train.checkpoints import MANIFEST, fault, listed, newest, step_of

log = logging.getLogger(__name__)

CHUNK_BYTES = 32 * 2**20
"""How much of a file is broadcast at once."""

_ATTEMPTS = 3
"""Tries of a registry request: after SIGTERM there are some 28 s in all."""


def sync_newest(folder: Path, ranks: Ranks) -> Path | None:
    """Return the newest complete checkpoint that rank 0 has below `folder`, once every node has it too."""
    chosen = newest(folder) if ranks.is_main else None
    name, digest = ranks.broadcast((chosen.name, sha256(chosen / MANIFEST)) if chosen else ("", ""))
    if not name:
        return None
    target = folder / name
    missing = ranks.is_local_main and not _is_same(target, digest)
    if any(ranks.broadcast(ranks.gather(missing))):
        if missing:
            log.info("receiving %s from rank 0", name)
            for old in listed(folder):
                shutil.rmtree(old)
        _broadcast_files(target, ranks, receive=missing)
    return target


def gather_random_states(checkpoint: Path, ranks: Ranks) -> None:
    """Copy each rank's random state of `checkpoint` to rank 0, before the checkpoint is sealed there."""
    own = checkpoint / f"rng_state_{ranks.rank}.pth"
    for rank, content in enumerate(ranks.gather(own.read_bytes() if own.is_file() else b"")):
        target = checkpoint / f"rng_state_{rank}.pth"
        if content and not target.exists():
            target.write_bytes(content)
    ranks.barrier()
    if ranks.is_local_main and not (checkpoint / "trainer_state.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)  # not rank 0's disk: it holds a random state alone


def _is_same(checkpoint: Path, digest: str) -> bool:
    manifest = checkpoint / MANIFEST
    return manifest.is_file() and sha256(manifest) == digest and fault(checkpoint) is None


def _broadcast_files(checkpoint: Path, ranks: Ranks, *, receive: bool) -> None:
    """Broadcast all files of rank 0's `checkpoint`, the manifest last; ranks with `receive` write them."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file()) if ranks.is_main else []
    paths.sort(key=lambda path: path.name == MANIFEST)
    for name in ranks.broadcast([str(path.relative_to(checkpoint)) for path in paths]):
        target = checkpoint / name
        source = target.open("rb") if ranks.is_main else None
        if receive:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
        while chunk := ranks.broadcast(source.read(CHUNK_BYTES) if source else b""):
            if receive:
                with target.open("ab") as stream:
                    stream.write(chunk)
        if source:
            source.close()
    ranks.barrier()


class RegistryCheckpoints:
    """The checkpoints of one job under one image reference; used by rank 0 alone."""

    def __init__(self, job: TuningJob, reference: oci.Reference, access: oci.Access):
        self._reference, self._name = reference, job.name
        self._keep, self._overwrite = job.output.keep_checkpoint_image, job.output.overwrite
        self._access = replace(access, attempts=_ATTEMPTS)
        self._key = signing_key(job, access)
        self._run = Run(job="", name=job.name)

    def restore(self, folder: Path, owner: JobIdentity) -> None:
        """Pull the newest complete checkpoint of this job into `folder`, unless a later one is there.

        ConfigError where the tag holds another job's checkpoint, or anything else, unless the job overwrites:
        then that, and nothing that comes later, is replaced.
        """
        found = oci.checkpoints.others(self._reference, job=owner.digest, access=self._access)
        if found and not self._overwrite:
            raise _taken(found[0])
        for other in found:
            log.warning("checkpoint image %s holds %s: it will be replaced", other.image, other.what)
        replaces = frozenset(other.digest for other in found)
        self._run = Run(owner.digest, self._name, owner.to_json(), replaces, self._key)
        local = newest(folder)
        for stored in oci.checkpoints.find(self._reference, job=owner.digest, access=self._access):
            if local is not None and stored.step <= step_of(local):
                return
            target = folder / f"checkpoint-{stored.step}"
            shutil.rmtree(target, ignore_errors=True)
            try:
                oci.pull(stored.image, target, access=self._access)
                reason = fault(target)
            except RegistryError as error:
                reason = str(error)
            if reason is None:
                log.info("restored step %s from %s", stored.step, self._reference)
                return
            log.warning("skipping checkpoint %s in %s: %s", stored.step, self._reference, reason)
            shutil.rmtree(target, ignore_errors=True)

    def save(self, checkpoint: Path) -> None:
        """Push a sealed checkpoint; a failure is logged, not raised."""
        step = step_of(checkpoint)
        try:
            oci.checkpoints.push(checkpoint, self._reference, step=step, run=self._run, access=self._access)
        except Failure as error:
            log.warning("checkpoint %s could not be pushed and is on this disk only: %s", step, error)

    def clear(self) -> None:
        """Remove the checkpoints after success, unless they are to be kept."""
        if self._keep:
            return
        try:
            oci.checkpoints.delete(self._reference, run=self._run, access=self._access)
        except Failure as error:
            log.warning("checkpoints in %s could not be removed: %s", self._reference, error)


def check_free(job: TuningJob, access: oci.Access) -> None:
    """Raise ConfigError where the job's checkpoint image is another job's, or no checkpoint.

    As far as that can be told before data and weights are there: what is left, `restore` finds.
    """
    if job.output.checkpoint_image is None or job.output.overwrite:
        return
    for other in oci.checkpoints.others(oci.parse(job.output.checkpoint_image), job="", access=access):
        owner = JobIdentity.from_json(other.identity)
        if owner is None:
            raise _taken(other)
        if differences := identity.requested(job).differences(owner):
            raise _taken(other, f" ({identity.in_words(differences)})")


def _taken(other: Other, why: str = "") -> ConfigError:
    return ConfigError(
        f"checkpoint image {other.image} holds {other.what}{why}; name another --checkpoint-image, or "
        "--overwrite to replace it"
    )


def registry_checkpoints(job: TuningJob, access: oci.Access) -> RegistryCheckpoints | None:
    """Return the registry side of the job's checkpoints, None when it names no image for them."""
    if job.output.checkpoint_image is None:
        return None
    return RegistryCheckpoints(job, oci.parse(job.output.checkpoint_image), access)
