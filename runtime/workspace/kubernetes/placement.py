"""How many pods a Workspace becomes, and how many GPUs each has.

Asks the memory plans of tuning and serving, with the GPUs that the instance type or a flag names. Does not
write objects. Start at `of_server` and `of_job`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from runtime import instance_types, support
from runtime.errors import CapacityError, ConfigError, Failure
from runtime.hardware import Hardware
from runtime.memory import serving, shape
from runtime.memory.shape import Shape
from runtime.memory.tuning import CONTEXT_BYTES
from runtime.serving.fit import requested
from runtime.serving.settings import ServeConfig
from runtime.tuning import fit
from runtime.tuning.settings import TuningJob
from runtime.workspace.instances import NAME_THE_GPU, gpus_of
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.manifest import WorkspaceDocuments

WHOLE_GPU = "nvidia.com/gpu"
BYPASS = "kaito.sh/bypass-resource-checks"
"""Annotation with which a user vouches for the memory."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Pods of one kind."""

    pods: int
    gpus: int = 0
    """GPUs of each pod, or slices of one."""
    resource: str = WHOLE_GPU
    """What a node calls them."""
    divided: bool = False
    """One model is divided among the GPUs of each pod."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Node:
    """The GPUs of one node."""

    count: int
    machine: Hardware | None
    """One of them; None where it is not known."""
    warnings: tuple[str, ...] = ()


def of_job(manifest: WorkspaceDocuments, job: TuningJob, options: PodOptions) -> Placement:
    """Return a pod for each node, with all its GPUs; CapacityError where the job does not fit on them."""
    pods = manifest.workspace.resource.count
    if options.gpus == 0:
        return Placement(pods)
    node = _node(manifest, options)
    warnings = list(node.warnings)
    if node.machine is not None:
        try:
            fit.check(job, node.machine, processes=node.count)
        except CapacityError as error:
            warnings.append(_vouched(manifest, error))
    return Placement(pods, node.count, warnings=tuple(warnings))


def of_server(manifest: WorkspaceDocuments, config: ServeConfig, options: PodOptions) -> Placement:
    """Return as many pods as the nodes' GPUs hold models, each with as few GPUs as hold one.

    Raises CapacityError where all GPUs of a node do not hold it: no model is divided among nodes.
    """
    resource = manifest.workspace.resource
    nodes, partition = resource.count * manifest.replicas, resource.partition
    if options.gpus == 0:
        return Placement(nodes)
    if partition is not None and partition.mode == "mig":
        if config.replicas > 1:
            raise ConfigError(
                f"{manifest.file}: replicas is {config.replicas}, and a process sees one MIG device: leave "
                "it out, there is a pod for each"
            )
        placed = _divide(manifest, config, gpus_of(manifest), nodes * partition.count)
        return replace(placed, resource=f"nvidia.com/mig-{partition.profile.replace('+', '.')}")
    node = _node(manifest, options)
    if config.replicas > 1:
        return _copies(manifest, config, node, nodes)
    if node.machine is not None:
        return _divide(manifest, config, replace(node.machine, count=node.count), nodes)
    if node.count == 1:
        return Placement(nodes, 1, warnings=node.warnings)
    raise ConfigError(
        f"{manifest.file}: whether a model is divided among {node.count} GPUs depends on their memory; "
        "name them with --gpu"
    )


def _copies(manifest: WorkspaceDocuments, config: ServeConfig, node: _Node, nodes: int) -> Placement:
    """Return pods with a GPU for each of the copies that the server's settings ask for."""
    if config.replicas > node.count:
        raise ConfigError(
            f"{manifest.file}: replicas is {config.replicas}, each on a GPU of its own, and a node has "
            f"{node.count}"
        )
    return Placement(nodes * (node.count // config.replicas), config.replicas, warnings=node.warnings)


def _divide(manifest: WorkspaceDocuments, config: ServeConfig, machine: Hardware, nodes: int) -> Placement:
    """Return the placement with the fewest GPUs a pod; `machine` is one of the equal nodes."""
    support.check_server(config.model, config.quantization, machine, engine=config.engine)
    try:
        model = shape.of(config.model)
    except Failure as error:
        warning = f"memory is not planned, so each pod has one GPU: {error}"
        return Placement(nodes * machine.count, 1, warnings=(warning,))
    refused = ""
    for count in _divisors(machine.count):
        refused = _indivisible(model, config, count) if count > 1 else ""
        if not refused and _fits(model, config, machine, count):
            return Placement(nodes * (machine.count // count), count, divided=count > 1)
    warning = _vouched(manifest, CapacityError(_too_large(model, config, machine, refused)))
    count = 1 if refused else machine.count
    return Placement(nodes * (machine.count // count), count, divided=count > 1, warnings=(warning,))


def _fits(model: Shape, config: ServeConfig, machine: Hardware, count: int) -> bool:
    """Whether one sequence fits beside the weights on `count` together: all but CUDA's context is divided."""
    together = count * machine.memory_bytes - (count - 1) * CONTEXT_BYTES["cuda"]
    all_of_them = replace(machine, memory_bytes=together)
    return serving.forecast(model, requested(config, machine, model), all_of_them).fits


def _indivisible(model: Shape, config: ServeConfig, count: int) -> str:
    """Return why `count` GPUs cannot divide the model, "" where they can (engine/parallel/shard.py)."""
    size = model.dimensions
    if not model.family.own_layers:
        return f"{model.model_type} models cannot be divided among GPUs"
    if model.quantized is not None or config.quantization is not None:
        return "quantised weights cannot be divided among GPUs"
    if size.heads % count or size.intermediate % count or (size.kv_heads % count and count % size.kv_heads):
        return f"{size.heads} attention heads cannot be divided among {count} GPUs"
    return ""


def _too_large(model: Shape, config: ServeConfig, machine: Hardware, refused: str) -> str:
    run = requested(config, machine, model)
    weights = serving.weights(model, run).size_bytes / 2**30
    kind = f"{machine.count} x {machine.name}" if machine.count > 1 else machine.name
    larger = ", ".join(serving.fits_on(model, run)[:5]) or "none that is known here"
    why = f"; {refused}" if refused else ""
    quantise = "" if config.quantization or model.quantized else ", or --quantize nf4"
    return (
        f"{model.name} ({weights:.0f} GiB of weights) does not fit on the GPUs of one node, {kind}{why}; one "
        f"model is not divided among nodes: take nodes with more or larger GPUs (one is enough of {larger})"
        f"{quantise}"
    )


def _node(manifest: WorkspaceDocuments, options: PodOptions) -> _Node:
    """Return the GPUs that a pod can have on one node: flags first, then the partition, then the type."""
    resource = manifest.workspace.resource
    rented = _rented(manifest) if options.machine is None else None
    machine = options.machine or rented
    count = options.gpus or (resource.partition.count if resource.partition else 0)
    if rented is not None and count > rented.count:
        field = "--gpus" if options.gpus else f"{manifest.file}: resource.partition.count"
        raise ConfigError(f"{field} is {count}, but {resource.instance_type} has {rented.count}")
    if machine is not None:
        return _Node(count or machine.count, replace(machine, count=1))
    name = f"resource.instanceType {resource.instance_type}" if resource.instance_type else "the GPU"
    hint = instance_types.hint(resource.instance_type) if resource.instance_type else ""
    warning = (
        f"{manifest.file.name}: {name} is not known here{hint}, so memory is not planned; {NAME_THE_GPU}"
    )
    return _Node(count or 1, None, (warning,))


def _rented(manifest: WorkspaceDocuments) -> Hardware | None:
    """Return the GPUs of the instance type; None where it is not known."""
    known = instance_types.find(manifest.workspace.resource.instance_type)
    return gpus_of(manifest) if known is not None else None


def _vouched(manifest: WorkspaceDocuments, error: CapacityError) -> str:
    """Return the error as a warning where the Workspace bypasses the check, else raise it."""
    if manifest.workspace.metadata.annotations.get(BYPASS, "").lower() != "true":
        raise error
    return f"{error} ({BYPASS} is set)"


def _divisors(count: int) -> Iterator[int]:
    yield from (number for number in range(1, count + 1) if count % number == 0)
