"""How many pods a Workspace becomes, and how many GPUs each has.

Asks the memory plans of tuning and serving, with the GPUs that the instance type or a flag names. Does not
write objects. Start at `of_server` and `of_job`.
"""

from dataclasses import dataclass, replace

from runtime import support
from runtime.errors import CapacityError, ConfigError, Failure
from runtime.hardware import Hardware
from runtime.memory import serving, shape
from runtime.memory.shape import Shape
from runtime.serving import fit
from runtime.serving.settings import ServeConfig
from runtime.tuning import fit as tuning_fit
from runtime.tuning.settings import TuningJob
from runtime.workspace.instances import NAME_THE_GPU, gpus_of, is_known
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.schema import BYPASS

WHOLE_GPU = "nvidia.com/gpu"

_UNKNOWN = Hardware("cuda", "GPU", None, 0, 1)


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
            tuning_fit.check(job, node.machine, processes=node.count)
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
        placed = _planned(manifest, config, gpus_of(manifest, options.machine), nodes * partition.count)
        return replace(placed, resource=f"nvidia.com/mig-{partition.profile.replace('+', '.')}")
    node = _node(manifest, options)
    if node.machine is not None:
        return _planned(manifest, config, replace(node.machine, count=node.count), nodes)
    if fit.is_laid_out(config):
        needed = fit.gpus_of_a_model(config, replace(_UNKNOWN, count=node.count)) * config.replicas
        return _on_each(nodes, node.count, needed, node.warnings)
    if node.count == 1:
        return Placement(nodes, 1, warnings=node.warnings)
    raise ConfigError(
        f"{manifest.file}: whether a model is divided among {node.count} GPUs depends on their memory; "
        "name them with --gpu"
    )


def _planned(manifest: WorkspaceDocuments, config: ServeConfig, machine: Hardware, nodes: int) -> Placement:
    """Return the placement that the memory plan says; `machine` is one of the equal nodes."""
    support.check_server(config.model, config.quantization, machine, engine=config.engine)
    try:
        model = shape.of(config.model)
    except Failure as error:
        needed = fit.gpus_of_a_model(config, machine) * config.replicas
        return _on_each(nodes, machine.count, needed, (f"memory is not planned: {error}",))
    try:
        layout = fit.lay_out(config, machine, model)
    except ConfigError as error:
        raise ConfigError(f"{manifest.file}: {error}") from None
    warnings = list(fit.warnings(layout, config, model))
    if not layout.fits:
        warnings.append(_vouched(manifest, CapacityError(_too_large(layout, model, machine))))
    divided = layout.divided and not fit.is_laid_out(config)
    return replace(_on_each(nodes, machine.count, layout.gpus, tuple(warnings)), divided=divided)


def _on_each(nodes: int, count: int, gpus: int, warnings: tuple[str, ...]) -> Placement:
    """Return as many pods of `gpus` as have place on nodes of `count`; what is left over is said."""
    idle = count % gpus
    said = (f"{idle} of the {count} GPUs of each node are not used: a server has {gpus}",) if idle else ()
    return Placement(nodes * (count // gpus), gpus, warnings=(*warnings, *said))


def _too_large(layout: fit.ServerLayout, model: Shape, machine: Hardware) -> str:
    weights = serving.weights(model, replace(layout.run, processes=1)).size_bytes / 2**30
    kind = f"{machine.count} x {machine.name}" if machine.count > 1 else machine.name
    larger = ", ".join(serving.fits_on(model, layout.run)[:5]) or "none that is known here"
    why = f"; {layout.indivisible}" if layout.indivisible else ""
    quantise = "" if layout.run.bits or model.quantized else ", or --quantize nf4"
    return (
        f"{model.name} ({weights:.0f} GiB of weights) does not fit on the GPUs of one node, {kind}{why}; one "
        f"model is not divided among nodes: take nodes with more or larger GPUs (one is enough of {larger})"
        f"{quantise}"
    )


def _node(manifest: WorkspaceDocuments, options: PodOptions) -> _Node:
    """Return the GPUs that a pod can have on one node: flags first, then the partition, then the type."""
    resource = manifest.workspace.resource
    if options.machine is not None or is_known(manifest):
        machine = gpus_of(manifest, options.machine)
        if options.machine is None and (options.gpus or 0) > machine.count:
            raise ConfigError(f"--gpus is {options.gpus}, but {resource.instance_type} has {machine.count}")
        return _Node(options.gpus or machine.count, replace(machine, count=1))
    count = options.gpus or (resource.partition.count if resource.partition else 0)
    if resource.instance_type and not count:
        gpus_of(manifest)  # which raises: how many GPUs it has is not known
    name = f"resource.instanceType {resource.instance_type}" if resource.instance_type else "the GPU"
    warning = f"{manifest.file.name}: {name} is not known here, so memory is not planned; {NAME_THE_GPU}"
    return _Node(count or 1, None, (warning,))


def _vouched(manifest: WorkspaceDocuments, error: CapacityError) -> str:
    """Return the error as a warning where the Workspace bypasses the check, else raise it."""
    if not manifest.workspace.metadata.asks(BYPASS):
        raise error
    return f"{error} ({BYPASS} is set)"
