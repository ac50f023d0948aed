"""Which GPUs a Workspace has on each node: by its instance type, its partition and what the user says.

The machines stand in instance_types.py, MIG profiles in gpus.py. Start at `gpus_of`.
"""

from dataclasses import replace

from runtime import gpus, instance_types
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.schema import Partition

NAME_THE_GPU = f"name its GPU with --gpu ({gpus.EXAMPLES}; auto is the one of this machine)"


def gpus_of(manifest: WorkspaceDocuments, named: Hardware | None = None) -> Hardware:
    """Return the GPUs that the Workspace has on a node, one slice where they are partitioned so.

    `named` are the node's GPUs as a flag names them, in place of the instance type. Raises ConfigError where
    neither names any, for a type that is not known or that this project does not run on, and for a partition
    that such GPUs do not have.
    """
    partition = manifest.workspace.resource.partition
    if partition is not None and partition.mode == "mig":
        return _slice(manifest, partition, named)
    node = named or _of_type(manifest)
    if partition is None or (named is not None and named.count == 1):
        return node if partition is None else replace(node, count=partition.count)
    if partition.count > node.count:
        raise ConfigError(
            f"{manifest.file}: resource.partition.count is {partition.count}, but a node has {node.count} "
            f"GPU(s), {node.name}"
        )
    return replace(node, count=partition.count)


def _slice(manifest: WorkspaceDocuments, partition: Partition, named: Hardware | None) -> Hardware:
    """Return a MIG slice of the profile, refused where the GPU or the node has none, or not so many."""
    where = f"{manifest.file}: resource.partition"
    known = named or (_of_type(manifest) if is_known(manifest) else None)
    try:
        most = gpus.most_slices(partition.profile, known.name if known else None)
    except ConfigError as error:
        raise ConfigError(f"{where}.profile: {error}") from None
    if known is not None and most is not None and partition.count > most * known.count:
        raise ConfigError(
            f"{where}.count is {partition.count}, but {known.count} x {known.name} has {most * known.count} "
            f"slices of {partition.profile}"
        )
    return gpus.named(f"{partition.gigabytes}GB").hardware


def is_known(manifest: WorkspaceDocuments) -> bool:
    """Whether the machine of the instance type is known here."""
    return instance_types.find(manifest.workspace.resource.instance_type) is not None


def _of_type(manifest: WorkspaceDocuments) -> Hardware:
    """Return all GPUs of the instance type."""
    name = manifest.workspace.resource.instance_type
    where = f"{manifest.file.name} resource.instanceType"
    if not name:
        raise ConfigError(f"{where} is missing, so the machine is not known; {NAME_THE_GPU}")
    found = instance_types.find(name)
    if found is not None:
        return gpus.of_instance_type(found)
    if instance_types.has_no_gpu(name):
        raise ConfigError(
            f"{where} is {name!r}, a machine without a GPU; take one with a GPU, such as {_AN_EXAMPLE}, "
            "or use its processors with `runtime manifest --gpus 0`"
        )
    hint = instance_types.hint(name)
    raise ConfigError(f"{where} is {name!r}, which is not known here{hint}; {NAME_THE_GPU}")


_AN_EXAMPLE = "Standard_NC24ads_A100_v4"
