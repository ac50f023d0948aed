"""A Workspace as plain Kubernetes objects, for a cluster without the controller.

A tuning Workspace becomes a Job, an inference Workspace a Deployment with a Service; the manifest itself
goes into a ConfigMap, and the pod reads it with `runtime tune FILE` or `runtime serve FILE`. Talks to no
cluster. Start at `objects`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from runtime import oci, ports
from runtime.config import read_text
from runtime.errors import EXIT_CODES, RETRIABLE, Failure, StoppedError
from runtime.oci.access import MOUNTED_SECRETS
from runtime.serving.settings import ServeConfig
from runtime.tuning.settings import CHECKPOINT_GRACE_S, TuningJob
from runtime.workspace.jobs import load_job
from runtime.workspace.layers import Resolved
from runtime.workspace.manifest import read
from runtime.workspace.schema import PresetSpec, TuningSpec, Workspace
from runtime.workspace.servers import load_server

Object = dict[str, Any]

FINAL_CODES = sorted(EXIT_CODES[kind] for kind in EXIT_CODES.keys() - RETRIABLE - {Failure})
"""Exit codes that another try would end with too. 1 is not among them: also a killed process may end so."""

USER = 10001
"""The image's own user."""
POD_PORT = 8080
"""Where the server listens in its pod: not every node lets this user have port 80, which is the Service's."""
FILE = Path("/etc/workspace/workspace.yaml")
PRE_STOP_S = 5
"""Time for the nodes' proxies to remove a pod that ends; requests that still arrive are served."""
EXIT_MARGIN_S = 15
"""From the end of the work to the end of the process."""


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What the objects need and a Workspace does not hold."""

    image: str
    """This project's image, as the cluster's nodes pull it."""
    gpus: int = 1
    """GPUs of each pod; 0 for nodes without any."""
    image_volumes: bool = False
    """Mount adapter images as volumes (Kubernetes 1.35, or the ImageVolume feature from 1.33 on)."""


def objects(file: Path, options: PodOptions) -> tuple[list[Object], tuple[str, ...]]:
    """Return the objects of the Workspace in `file`, and warnings for the user.

    Raises ConfigError for a manifest that the pod would refuse.
    """
    workspace = read(file).workspace
    environ = {"KUBERNETES_SERVICE_HOST": "a pod's own"}  # so that folders are those of a pod
    made: list[Object] = [_config_map(workspace, read_text(file))]
    resolved: Resolved[TuningJob] | Resolved[ServeConfig]
    if workspace.tuning is not None:
        resolved = job = load_job(file, environ=environ)
        made += _tuning(workspace, workspace.tuning, job.config, options)
    else:
        resolved = server = load_server(file, environ=environ)
        made += _serving(workspace, server.config, options)
    return made, (*resolved.warnings, *resolved.placeholders)


def _tuning(workspace: Workspace, spec: TuningSpec, job: TuningJob, options: PodOptions) -> list[Object]:
    name, nodes = workspace.metadata.name, workspace.resource.count
    arguments = ["tune", str(FILE)]
    if job.output.image:
        arguments += ["--checkpoint-image", oci.checkpoints.beside(job.output.image)]
    container = _container("tune", spec.preset, options, arguments)
    folder = job.data.folder or Path("/mnt/data")
    volumes = [
        _volume("data", spec.input.volume or {"emptyDir": {}}, folder, container),
        _volume("results", spec.output.volume or {"emptyDir": {}}, job.output.folder, container),
    ]
    secrets = [spec.output.image_push_secret, *spec.input.image_pull_secrets]
    pod = _pod(workspace, spec.preset, container, [*volumes, *_secrets(secrets, container)], options)
    pod |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": CHECKPOINT_GRACE_S + 2 * EXIT_MARGIN_S}
    job_spec: Object = {
        "backoffLimit": 6,
        # The next pod starts after the last one has written its checkpoint, never beside it.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _rules(container["name"])},
    }
    template = {"metadata": {"labels": _labels(workspace)}, "spec": pod}
    extra: list[Object] = []
    if nodes > 1:
        job_spec |= {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
        container["ports"] = [{"name": "torchrun", "containerPort": ports.RENDEZVOUS}]
        container["env"] = [
            *container.get("env", []),
            {"name": "NNODES", "value": str(nodes)},
            {"name": "MASTER_ADDR", "value": f"{name}-0.{name}"},
            {"name": "MASTER_PORT", "value": str(ports.RENDEZVOUS)},
        ]
        pod["subdomain"] = name
        extra.append(_rendezvous_service(workspace))
    return [*extra, _object("batch/v1", "Job", workspace, {**job_spec, "template": template})]


def _rules(container: str) -> list[Object]:
    """Return the Job's failure policy: an evicted or stopped pod is no failure, a wrong job is final."""

    def on_codes(action: str, codes: Iterable[int]) -> Object:
        rule = {"containerName": container, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": rule}

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_codes("Ignore", [EXIT_CODES[StoppedError]]),
        on_codes("FailJob", FINAL_CODES),
    ]


def _rendezvous_service(workspace: Workspace) -> Object:
    """Return the headless Service that gives each pod of an indexed Job a name."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": workspace.metadata.name},
        "ports": [{"name": "torchrun", "port": ports.RENDEZVOUS}],
    }
    return _object("v1", "Service", workspace, spec)


def _serving(workspace: Workspace, server: ServeConfig, options: PodOptions) -> list[Object]:
    spec = workspace.inference
    assert spec is not None and spec.preset is not None, "load_server refuses other Workspaces"  # noqa: S101
    container = _container("serve", spec.preset, options, ["serve", str(FILE), "--port", str(POD_PORT)])
    container["ports"] = [{"name": "http", "containerPort": POD_PORT}]
    container |= _probes()
    container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}}
    volumes, secrets = [], []
    for number, adapter in enumerate(spec.adapters):
        folder = Path("/mnt/adapter") / adapter.source.name
        if adapter.source.volume is not None:
            volumes.append(_volume(f"adapter-{number}", adapter.source.volume, folder, container))
        elif options.image_volumes:
            source = {"image": {"reference": adapter.source.image, "pullPolicy": "IfNotPresent"}}
            volumes.append(_volume(f"adapter-{number}", source, folder, container, sub_path="data"))
        secrets += adapter.source.image_pull_secrets
    if not options.image_volumes:
        volumes += _secrets(secrets, container)
    pod = _pod(workspace, spec.preset, container, volumes, options)
    if options.image_volumes and secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in dict.fromkeys(secrets)]
    drain_s = PRE_STOP_S + server.drain_delay_s + server.drain_timeout_s
    pod["terminationGracePeriodSeconds"] = ceil(drain_s) + EXIT_MARGIN_S
    deployment = {
        "replicas": workspace.resource.count,
        # No surge: a GPU for a further pod is rarely free.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "selector": {"matchLabels": _labels(workspace)},
        "template": {"metadata": {"labels": _labels(workspace)}, "spec": pod},
    }
    service = {
        "selector": _labels(workspace),
        "ports": [{"name": "http", "port": ports.SERVING, "targetPort": "http"}],
    }
    return [
        _object("apps/v1", "Deployment", workspace, deployment),
        _object("v1", "Service", workspace, service),
    ]


def _probes() -> Object:
    """Return the probes: half an hour to load, then readiness by /readyz and restarts by /livez alone."""
    ready = {"httpGet": {"path": "/readyz", "port": "http"}}
    alive = {"httpGet": {"path": "/livez", "port": "http"}}
    return {
        "startupProbe": {**ready, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 3},
        "livenessProbe": {**alive, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
    }


def _container(name: str, preset: PresetSpec, options: PodOptions, arguments: list[str]) -> Object:
    """Return a container that may write to its volumes and nowhere else."""
    environ: list[Object] = []
    if preset.options.model_access_secret:
        secret = {"name": preset.options.model_access_secret, "key": "HF_TOKEN"}
        environ.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}})
    container: Object = {
        "name": name,
        "image": options.image,
        "args": arguments,
        **({"env": environ} if environ else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [],
    }
    if options.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": options.gpus}}
    return container


def _pod(
    workspace: Workspace, preset: PresetSpec, container: Object, volumes: list[Object], options: PodOptions
) -> Object:
    """Return the pod of `container`, with its keys in the order of the printed file."""
    shared = [
        _volume("workspace", {"configMap": {"name": _map_name(workspace)}}, FILE.parent, container),
        _volume("cache", {"emptyDir": {}}, Path("/cache"), container),
        _volume("shm", {"emptyDir": {"medium": "Memory"}}, Path("/dev/shm"), container),  # noqa: S108
    ]
    if preset.options.model_weights_pvc:
        claim = {"claimName": preset.options.model_weights_pvc, "readOnly": True}
        weights, sub_path = Path("/workspace/weights"), preset.options.model_weights_sub_path
        source = {"persistentVolumeClaim": claim}
        shared.append(_volume("weights", source, weights, container, sub_path=sub_path))
    pod: Object = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": 0,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }
    if options.gpus:
        pod |= _gpu_nodes(workspace)
    return {**pod, "containers": [container], "volumes": [*shared, *volumes]}


def _gpu_nodes(workspace: Workspace) -> Object:
    """Return the choice of nodes: of the given instance type, or by their labels where none is given."""
    resource = workspace.resource
    labels = dict(resource.label_selector.match_labels) if resource.label_selector else {}
    if resource.instance_type:
        labels = {"node.kubernetes.io/instance-type": resource.instance_type}
    spot = {"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"}
    tolerations: list[Object] = [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "sku", "value": "gpu", "effect": "NoSchedule"},
        spot,
    ]
    return {**({"nodeSelector": labels} if labels else {}), "tolerations": tolerations}


def _volume(name: str, source: Object, folder: Path, container: Object, *, sub_path: str = "") -> Object:
    """Return the volume, mounted into `container` at `folder`."""
    mount = {"name": name, "mountPath": str(folder)}
    container["volumeMounts"].append(mount | ({"subPath": sub_path} if sub_path else {}))
    return {"name": name, **source}


def _secrets(names: Iterable[str], container: Object) -> list[Object]:
    """Return a volume with the registries' credentials at the path where controllers mount them, if any."""
    sources = [
        {"secret": {"name": name, "items": [{"key": ".dockerconfigjson", "path": f"{name}.json"}]}}
        for name in dict.fromkeys(filter(None, names))
    ]
    if not sources:
        return []
    return [_volume("registries", {"projected": {"sources": sources}}, MOUNTED_SECRETS, container)]


def _config_map(workspace: Workspace, text: str) -> Object:
    metadata = {"name": _map_name(workspace), "labels": _labels(workspace)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {FILE.name: text}}


def _map_name(workspace: Workspace) -> str:
    return f"{workspace.metadata.name}-workspace"


def _object(version: str, kind: str, workspace: Workspace, spec: Object) -> Object:
    metadata = {"name": workspace.metadata.name, "labels": _labels(workspace)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _labels(workspace: Workspace) -> Object:
    work = "tuning" if workspace.tuning is not None else "inference"
    return {
        "app.kubernetes.io/name": "workspace-runtime",
        "app.kubernetes.io/instance": workspace.metadata.name,
        "app.kubernetes.io/component": work,
    }
