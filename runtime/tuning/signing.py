"""The key that a job signs its images with: the adapter's, and those of its checkpoints.

Start at `signing_key`.
"""

from runtime import oci
from runtime.errors import ConfigError
from runtime.tuning.settings import TuningJob


def signing_key(job: TuningJob, access: oci.Access) -> oci.SigningKey | None:
    """Return the job's key; None without one. ConfigError when it cannot be read, or is missing.

    Checkpoints in a registry that the job could not pull again would be of no use.
    """
    if job.output.sign_key is not None:
        return oci.read_private(job.output.sign_key, access.key_password)
    if access.required_keys and job.output.checkpoint_image is not None:
        raise ConfigError(
            f"checkpoint image {job.output.checkpoint_image}: signatures are required of what is pulled, and"
            " the job has no key to sign its checkpoints with; name one with --sign"
        )
    return None
