"""Which GPUs the machine that a Workspace names has (resource.instanceType).

The machines stand in instance_types.py. Start at `gpus_of`.
"""

from runtime import gpus, instance_types
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.workspace.manifest import WorkspaceDocuments

NAME_THE_GPU = f"name its GPU with --gpu ({gpus.EXAMPLES}; auto is the one of this machine)"


def gpus_of(manifest: WorkspaceDocuments) -> Hardware:
    """Return the GPUs of the instance type in `manifest`; one slice of it where it is partitioned so.

    Raises ConfigError where it names none, one that is not known, or one that this project does not run on.
    """
    resource = manifest.workspace.resource
    partition = resource.partition
    if partition is not None and partition.mode == "mig":
        return gpus.named(f"{partition.gigabytes}GB").hardware
    where = f"{manifest.file.name} resource.instanceType"
    if not resource.instance_type:
        raise ConfigError(f"{where} is missing, so the machine is not known; {NAME_THE_GPU}")
    found = instance_types.find(resource.instance_type)
    if found is None:
        hint = instance_types.hint(resource.instance_type)
        raise ConfigError(
            f"{where} is {resource.instance_type!r}, which is not known here{hint}; {NAME_THE_GPU}"
        )
    return gpus.of_instance_type(found)
