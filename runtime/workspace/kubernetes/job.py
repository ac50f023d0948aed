"""A tuning Workspace as a Job, of several nodes as an indexed one with a Service between them.

Knows exit codes and checkpoints. Start at `objects_of_job`.
"""

from collections.abc import Iterable

from runtime import oci, ports
from runtime.errors import EXIT_CODES, RETRIABLE, Failure, StoppedError
from runtime.tuning.settings import CHECKPOINT_GRACE_S, TuningJob
from runtime.workspace.kubernetes import files, pod
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.kubernetes.placement import Placement
from runtime.workspace.kubernetes.pod import EXIT_MARGIN_S, Accelerators, Object
from runtime.workspace.manifest import WorkspaceDocuments

FINAL_CODES = sorted(EXIT_CODES[kind] for kind in EXIT_CODES.keys() - RETRIABLE - {Failure})
"""Exit codes that another try would end with too. 1 is not among them: also a killed process may end so."""


def objects_of_job(
    manifest: WorkspaceDocuments,
    job: TuningJob,
    placement: Placement,
    options: PodOptions,
    *,
    weights_bytes: int | None,
) -> list[Object]:
    """Return the Job that runs `job`, after the Service of its nodes where there are several."""
    made = _container(manifest, job, options)
    needed = Accelerators(placement.gpus, placement.resource, weights_bytes, pod.downloads(manifest))
    made["resources"] = pod.requests(needed, options)
    template = _pod(manifest, job, made, options, gpus=placement.gpus > 0)
    spec: Object = {
        "backoffLimit": 6,
        # The next pod starts after the last one has written its checkpoint, never beside it.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _rules(made["name"])},
    }
    several = placement.pods > 1
    if several:
        spec |= {"completionMode": "Indexed", "completions": placement.pods, "parallelism": placement.pods}
        template["subdomain"] = manifest.workspace.metadata.name
        _meet(made, manifest.workspace.metadata.name, placement.pods)
    spec["template"] = {"metadata": {"labels": pod.labels(manifest)}, "spec": template}
    described = {**pod.named("batch/v1", "Job", manifest), "spec": spec}
    return [_rendezvous_service(manifest), described] if several else [described]


def _pod(
    manifest: WorkspaceDocuments, job: TuningJob, made: Object, options: PodOptions, *, gpus: bool
) -> Object:
    spec = manifest.workspace.tuning
    assert spec is not None, "load_job refuses other Workspaces"  # noqa: S101
    volumes = [
        pod.volume("data", spec.input.volume or {"emptyDir": {}}, job.data.folder, made),
        pod.volume("results", spec.output.volume or {"emptyDir": {}}, job.output.folder, made),
    ]
    volumes += pod.registry_secrets([spec.output.image_push_secret, *spec.input.image_pull_secrets], made)
    template = pod.pod(manifest, made, volumes, options, gpus=gpus)
    grace_s = CHECKPOINT_GRACE_S + 2 * EXIT_MARGIN_S
    return {**template, "restartPolicy": "Never", "terminationGracePeriodSeconds": grace_s}


def _container(manifest: WorkspaceDocuments, job: TuningJob, options: PodOptions) -> Object:
    preset = manifest.workspace.preset
    assert preset is not None, "a tuning Workspace has one"  # noqa: S101
    arguments = ["tune", str(files.FILE)]
    if job.output.image:
        arguments += ["--checkpoint-image", oci.checkpoints.beside(job.output.image)]
    return pod.container("tune", preset, options, arguments)


def _meet(made: Object, name: str, nodes: int) -> None:
    """Have the pods meet at the first one, by the name that the Service gives it."""
    made["ports"] = [{"name": "torchrun", "containerPort": ports.RENDEZVOUS}]
    made["env"] = [
        *made.get("env", []),
        {"name": "NNODES", "value": str(nodes)},
        {"name": "MASTER_ADDR", "value": f"{name}-0.{name}"},
        {"name": "MASTER_PORT", "value": str(ports.RENDEZVOUS)},
    ]


def _rules(name: str) -> list[Object]:
    """Return the Job's failure policy: an evicted or stopped pod is no failure, a wrong job is final."""

    def on_codes(action: str, codes: Iterable[int]) -> Object:
        rule = {"containerName": name, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": rule}

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_codes("Ignore", [EXIT_CODES[StoppedError]]),
        on_codes("FailJob", FINAL_CODES),
    ]


def _rendezvous_service(manifest: WorkspaceDocuments) -> Object:
    """Return the headless Service that gives each pod of an indexed Job a name."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": manifest.workspace.metadata.name},
        "ports": [{"name": "torchrun", "port": ports.RENDEZVOUS}],
    }
    return {**pod.named("v1", "Service", manifest), "spec": spec}
