"""Pushes a finished adapter as an OCI image: the last step of a job, idempotent.

Does not know registries (runtime/oci does). Start at `publish`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from runtime import oci
from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.checkpoint_sync import registry_checkpoints

log = logging.getLogger(__name__)

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tuning_report.json",
    "report.html",
)
"""Files of the image's /data; those that do not exist are left out."""


def files(folder: Path) -> list[str]:
    """Return the files of `folder` that an adapter image holds."""
    return [name for name in FILES if (folder / name).is_file()]


def annotations(job: TuningJob) -> dict[str, str]:
    """Return the image's annotations: KAITO's model name, and OCI's own for provenance.

    No time of creation: the same adapter pushed twice is the same image.
    """
    report = json.loads(OutputPaths(job.output.folder).report.read_text(encoding="utf-8"))
    digests = " ".join(file["sha256"] for file in report["data"]["files"])
    given = {
        "sh.kaito.model.name": job.model.name,
        "org.opencontainers.image.title": job.name,
        "org.opencontainers.image.base.name": job.model.repository or job.model.name,
        "org.opencontainers.image.revision": job.model.revision or "",
        "sh.kaito.tuning.data.sha256": digests,
    }
    return {name: value for name, value in given.items() if value}


def publish(job: TuningJob, access: oci.Access) -> str | None:
    """Push the adapter in the output folder to `output.image`; return its digest, None without an image."""
    if job.output.image is None:
        return None
    digest = oci.push(
        job.output.folder,
        oci.parse(job.output.image),
        files=files(job.output.folder),
        annotations=annotations(job),
        access=access,
    )
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
    return oci.from_environment(environ, files=files, insecure=job.output.insecure)
