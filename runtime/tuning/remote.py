"""A job's checkpoints in a registry, so that a pod on another node, with an empty disk, goes on.

An upload that fails costs that checkpoint alone: training goes on and the next one is tried. Does not
know registries (runtime/oci does) or what is in a checkpoint. Start at `Remote.restore`.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from runtime import oci
from runtime.errors import Failure, RegistryError
from runtime.tuning import checkpoints
from runtime.tuning.settings import TuningJob

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Tries of a request: after SIGTERM there are some 28 s in all."""


class Remote:
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
        local = checkpoints.newest(folder)
        for found in oci.checkpoints.find(self._reference, job=mark, access=self._access):
            if local is not None and found.step <= checkpoints.step_of(local):
                return
            target = folder / f"checkpoint-{found.step}"
            shutil.rmtree(target, ignore_errors=True)
            try:
                oci.pull(found.image, target, access=self._access)
                reason = checkpoints.fault(target)
            except RegistryError as error:
                reason = str(error)
            if reason is None:
                log.info("step %s brought back from %s", found.step, self._reference)
                return
            log.warning("checkpoint %s in %s is passed over: %s", found.step, self._reference, reason)
            shutil.rmtree(target, ignore_errors=True)

    def save(self, checkpoint: Path) -> None:
        """Push a sealed checkpoint; a failure is logged, not raised."""
        step = checkpoints.step_of(checkpoint)
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


def of(job: TuningJob, access: oci.Access) -> Remote | None:
    """Return the registry side of the job's checkpoints, None when it names no image for them."""
    if job.output.checkpoint_image is None:
        return None
    reference = oci.parse(job.output.checkpoint_image)
    return Remote(reference, access, keep=job.output.keep_checkpoint_image)
