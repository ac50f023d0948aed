"""Checkpoints in a registry, from which a run that lost its node and its disk resumes.

Each is an image beside the job's output (`…:TAG-checkpoint`), the one before it under
`…:TAG-checkpoint-previous`. A tag is written after all blobs, so what it names is complete. Does not
know what is in a checkpoint. Start at `push` and `find`.
"""

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.errors import RegistryError
from runtime.oci import images
from runtime.oci.access import DEFAULT, Access
from runtime.oci.reference import Reference, parse, with_suffix
from runtime.oci.store import Store, StoredManifest

log = logging.getLogger(__name__)

_STEP = "sh.kaito.tuning.checkpoint.step"
_JOB = "sh.kaito.tuning.checkpoint.job"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that a registry holds."""

    step: int
    image: Reference
    """By digest, so that it stays the same one when the tag is overwritten."""


def beside(output: str) -> str:
    """Return the name of the checkpoint image for the output image `output`."""
    return with_suffix(output, "-checkpoint")


def push(folder: Path, reference: Reference, *, step: int, job: str, access: Access = DEFAULT) -> str | None:
    """Push the checkpoint in `folder`; return its digest, None when the registry holds a later one.

    job: fingerprint of the run; checkpoints of another run under the same name are replaced, later ones
    of this run are not (a pod that was cut off must not undo the work of its successor).
    """
    with closing(images.open_store(reference, access)) as store:
        current = store.find(reference.selector)
        stored_step = _step(current, job) if current is not None else None
        if stored_step is not None and stored_step > step:
            log.warning("%s holds step %s of this job, later than %s: kept", reference, stored_step, step)
            return None
        if current is not None and stored_step != step:
            _keep_previous(store, current, reference)
    notes = {_STEP: str(step), _JOB: job}
    return images.push(folder, reference, annotations=notes, access=access)


def find(reference: Reference, *, job: str, access: Access = DEFAULT) -> list[Checkpoint]:
    """Return the checkpoints of this run that a registry holds, the newest first."""
    found: dict[int, Checkpoint] = {}
    with closing(images.open_store(reference, access)) as store:
        for name in (reference, _previous(reference)):
            try:
                manifest = store.find(name.selector)
            except RegistryError as error:
                log.warning("checkpoint %s cannot be read and is skipped: %s", name, error)
                continue
            step = _step(manifest, job) if manifest is not None else None
            if manifest is not None and step is not None:
                found.setdefault(step, Checkpoint(step, replace(name, tag=None, digest=manifest.digest)))
    return sorted(found.values(), key=lambda each: each.step, reverse=True)


def delete(reference: Reference, *, access: Access = DEFAULT) -> None:
    """Delete the checkpoints under this name; a registry that refuses is logged, not raised."""
    with closing(images.open_store(reference, access)) as store:
        for name in (reference, _previous(reference)):
            store.delete(name.selector)


def _keep_previous(store: Store, current: StoredManifest, reference: Reference) -> None:
    """Tag the current checkpoint as the previous one, and delete the one before."""
    previous = _previous(reference)
    older = store.find(previous.selector)
    if older is not None and older.digest != current.digest:
        store.delete(previous.selector)
    with store.writing():
        store.put_manifest(current, previous.selector)


def _previous(reference: Reference) -> Reference:
    return parse(with_suffix(str(reference), "-previous"))


def _step(manifest: StoredManifest, job: str) -> int | None:
    """Return the step of a checkpoint manifest of this job, None for anything else."""
    try:
        notes = manifest.document["annotations"]
        return int(notes[_STEP]) if notes[_JOB] == job else None
    except (ValueError, KeyError, TypeError):
        return None
