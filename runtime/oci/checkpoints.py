"""Checkpoints in a registry, from which a run that lost its node and its disk resumes.

Each is an image beside the job's output (`…:TAG-checkpoint`), the one before it under
`…:TAG-checkpoint-previous`. A tag is written after all blobs, so what it names is complete. What is there of
others is replaced only where a run has found it at its start and may. Does not know what is in a checkpoint.
Start at `push` and `find`, then `others`.
"""

import logging
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runtime.errors import RegistryError
from runtime.files import temporary_folder
from runtime.oci import images, signatures
from runtime.oci.access import DEFAULT, Access
from runtime.oci.image import Image, build
from runtime.oci.keys import SigningKey
from runtime.oci.reference import Reference, parse, with_suffix
from runtime.oci.store import Store, StoredManifest

log = logging.getLogger(__name__)

_STEP = "sh.kaito.tuning.checkpoint.step"
_JOB = "sh.kaito.tuning.checkpoint.job"
_NAME = "sh.kaito.tuning.checkpoint.name"
_IDENTITY = "sh.kaito.tuning.checkpoint.identity"


@dataclass(frozen=True, slots=True)
class Run:
    """Whose checkpoints they are."""

    job: str
    """Fingerprint: runs of one job resume from one another's checkpoints."""
    name: str
    """What people call it."""
    identity: str = ""
    """What the fingerprint is of, as a text that `Other` gives back."""
    replaces: Collection[str] = ()
    """Digests of others' images under the same tags that it may replace."""
    key: SigningKey | None = None
    """Signs them."""


@dataclass(frozen=True, slots=True)
class Other:
    """What stands under the tag of a run's checkpoints and is not its own."""

    image: Reference
    digest: str
    what: str
    """In words: whose checkpoint it is, or that it is none."""
    identity: str
    """Of its job; "" where that is not recorded."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that a registry holds."""

    step: int
    image: Reference
    """By digest, so that it stays the same one when the tag is overwritten."""


def beside(output: str) -> str:
    """Return the name of the checkpoint image for the output image `output`."""
    return with_suffix(output, "-checkpoint")


def push(folder: Path, reference: Reference, *, step: int, run: Run, access: Access = DEFAULT) -> str | None:
    """Push the checkpoint in `folder`; return its digest, None when the registry holds a later one.

    Later checkpoints of the run are kept: a pod that was cut off must not undo the work of its successor.
    RegistryError where the tag holds anything else that `run` may not replace.
    """
    with closing(images.open_store(reference, access)) as store:
        current = store.find(reference.selector)
        if (other := _other(current, reference, run.job)) is not None and other.digest not in run.replaces:
            raise RegistryError(
                f"{reference} holds {other.what}, which is kept; name another checkpoint image"
            )
        stored_step = _step(current, run.job) if current is not None else None
        if stored_step is not None and stored_step > step:
            log.warning("%s holds step %s of this job, later than %s: kept", reference, stored_step, step)
            return None
        if current is not None and stored_step is not None and stored_step != step:
            _keep_previous(store, current, reference, run)
    notes = {_STEP: str(step), _JOB: run.job, _NAME: run.name, _IDENTITY: run.identity}

    def sign(store: Store, image: Image) -> None:
        if run.key is not None:
            signatures.sign(store, reference, image.digest, run.key)

    with temporary_folder("push-") as scratch:
        made = partial(build, folder, scratch, annotations=notes)
        return images.push_image(made, reference, access=access, beside=sign)


def others(reference: Reference, *, job: str, access: Access = DEFAULT) -> list[Other]:
    """Return what a registry holds under the tags of these checkpoints that is not of `job`."""
    with closing(images.open_store(reference, access)) as store:
        found = [_other(_manifest(store, name), name, job) for name in (reference, _previous(reference))]
    return [other for other in found if other is not None]


def find(reference: Reference, *, job: str, access: Access = DEFAULT) -> list[Checkpoint]:
    """Return the checkpoints of this run that a registry holds, the newest first."""
    found: dict[int, Checkpoint] = {}
    with closing(images.open_store(reference, access)) as store:
        for name in (reference, _previous(reference)):
            manifest = _manifest(store, name)
            step = _step(manifest, job) if manifest is not None else None
            if manifest is not None and step is not None:
                found.setdefault(step, Checkpoint(step, replace(name, tag=None, digest=manifest.digest)))
    return sorted(found.values(), key=lambda each: each.step, reverse=True)


def delete(reference: Reference, *, run: Run, access: Access = DEFAULT) -> None:
    """Delete the checkpoints of `run`; a registry that refuses is logged, not raised. Others' stay."""
    with closing(images.open_store(reference, access)) as store:
        for name in (reference, _previous(reference)):
            found = _manifest(store, name)
            if found is not None and (_step(found, run.job) is not None or found.digest in run.replaces):
                _delete(store, name.selector, found.digest)


def _delete(store: Store, tag: str, digest: str) -> None:
    """Delete a checkpoint, and its signatures first: nothing else names them."""
    if store.find(signatures.tag(digest)) is not None:
        store.delete(signatures.tag(digest))
    store.delete(tag)


def _keep_previous(store: Store, current: StoredManifest, reference: Reference, run: Run) -> None:
    """Tag the current checkpoint as the previous one, and delete the one before."""
    previous = _previous(reference)
    older = store.find(previous.selector)
    if (other := _other(older, previous, run.job)) is not None and other.digest not in run.replaces:
        log.warning(
            "%s holds %s, which is kept: there is no earlier checkpoint of this job", previous, other.what
        )
        return
    if older is not None and older.digest != current.digest:
        _delete(store, previous.selector, older.digest)
    with store.writing():
        store.put_manifest(current, previous.selector)


def _manifest(store: Store, name: Reference) -> StoredManifest | None:
    """Return what stands under a tag; None for nothing, and for what cannot be read, which is logged."""
    try:
        return store.find(name.selector)
    except RegistryError as error:
        log.warning("checkpoint %s cannot be read and is skipped: %s", name, error)
        return None


def _other(manifest: StoredManifest | None, name: Reference, job: str) -> Other | None:
    """Return what `manifest` is unless it is a checkpoint of this job."""
    if manifest is None or _step(manifest, job) is not None:
        return None
    notes = manifest.document.get("annotations")
    notes = notes if isinstance(notes, dict) else {}
    if _JOB in notes:
        whose = notes.get(_NAME) or f"the job {str(notes[_JOB])[:12]}"
        what = f"step {notes.get(_STEP)} of another job, {whose}"
    else:
        what = f"an image that is no checkpoint ({manifest.digest[:19]})"
    return Other(name, manifest.digest, what, str(notes.get(_IDENTITY, "")))


def _previous(reference: Reference) -> Reference:
    return parse(with_suffix(str(reference), "-previous"))


def _step(manifest: StoredManifest, job: str) -> int | None:
    """Return the step of a checkpoint manifest of this job, None for anything else."""
    try:
        notes = manifest.document["annotations"]
        return int(notes[_STEP]) if notes[_JOB] == job else None
    except (ValueError, KeyError, TypeError):
        return None
