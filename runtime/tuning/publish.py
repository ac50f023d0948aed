"""Pushes a finished adapter as an OCI image, signed and with its provenance: the last step, idempotent.

Does not know registries (runtime/oci does) nor what is pushed (packing.py). Start at `publish`.
"""

import logging
from collections.abc import Mapping
from functools import partial

from runtime import oci, packing
from runtime.files import temporary_folder
from runtime.oci.image import build
from runtime.provenance import attaching
from runtime.tuning.settings import TuningJob
from runtime.tuning.signing import signing_key
from runtime.tuning.train.checkpoint_sync import registry_checkpoints

log = logging.getLogger(__name__)


def publish(job: TuningJob, access: oci.Access) -> str | None:
    """Push the adapter in the output folder to `output.image`; return its digest, None without an image."""
    if job.output.image is None:
        return None
    folder, reference = job.output.folder, oci.parse(job.output.image)
    files = packing.files(folder)
    key, stated = signing_key(job, access), job.output.provenance
    with (
        temporary_folder("push-") as scratch,
        attaching(folder, files, reference, key=key, stated=stated) as beside,
    ):
        made = partial(build, folder, scratch, files=files, annotations=packing.annotations(folder))
        digest = oci.push_image(made, reference, access=access, beside=beside)
    log.info("pushed %s@%s", job.output.image, digest)
    return digest


def publish_again(job: TuningJob, access: oci.Access) -> None:
    """Publish the adapter of a finished job once more, and remove checkpoints that its run may have left."""
    log.info("%s holds this job's finished adapter: not training again", job.output.folder)
    publish(job, access)
    if (checkpoints := registry_checkpoints(job, access)) is not None:
        checkpoints.clear()


def access_of(job: TuningJob, environ: Mapping[str, str]) -> oci.Access:
    """Return the registry access that the job and a process's environment give."""
    files = [job.output.credentials] if job.output.credentials else []
    access = oci.from_environment(environ, files=files, insecure=job.output.insecure)
    return access.requiring(job.model.required_keys)
