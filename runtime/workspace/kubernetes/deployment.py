"""An inference Workspace as a Deployment and a Service.

Knows probes, drain and how adapters come into the pod. Start at `objects_of_server`.
"""

from math import ceil
from pathlib import Path

from runtime import ports
from runtime.serving.settings import API_KEY_VARIABLE, ServeConfig
from runtime.workspace.kubernetes import files, pod
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.kubernetes.placement import Placement
from runtime.workspace.kubernetes.pod import EXIT_MARGIN_S, Accelerators, Object
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.schema import LOAD_BALANCER, InferenceSpec

POD_PORT = 8080
"""Where the server listens in its pod: not every node lets this user have port 80, which is the Service's."""
KEYS, API_KEY_FILE = Path("/etc/workspace-runtime"), "api-keys"
"""Where the file of API keys is mounted."""
PRE_STOP_S = 5
"""Time for the nodes' proxies to remove a pod that ends; requests that still arrive are served."""


def objects_of_server(
    manifest: WorkspaceDocuments,
    server: ServeConfig,
    placement: Placement,
    options: PodOptions,
    *,
    weights_bytes: int | None,
) -> list[Object]:
    """Return the Deployment of `server` and the Service before it."""
    made = _container(manifest, placement, options)
    needed = Accelerators(
        placement.gpus, placement.resource, weights_bytes, pod.downloads(manifest), server.replicas
    )
    made["resources"] = pod.requests(needed, options)
    inference = manifest.workspace.inference
    assert inference is not None, "load_server refuses other Workspaces"  # noqa: S101
    volumes, secrets = _adapters(inference, made, options)
    volumes += _keys(made, options)
    template = pod.pod(manifest, made, volumes, options, gpus=placement.gpus > 0)
    if options.image_volumes and secrets:
        others = template.get("imagePullSecrets", [])
        template["imagePullSecrets"] = [
            *others,
            *({"name": name} for name in secrets if {"name": name} not in others),
        ]
    drain_s = PRE_STOP_S + server.drain_delay_s + server.drain_timeout_s
    template["terminationGracePeriodSeconds"] = ceil(drain_s) + EXIT_MARGIN_S
    deployment = {
        "replicas": placement.pods,
        # No surge: a GPU for a further pod is rarely free.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "selector": {"matchLabels": pod.selector(manifest)},
        "template": {"metadata": {"labels": pod.labels(manifest)}, "spec": template},
    }
    return [{**pod.named("apps/v1", "Deployment", manifest), "spec": deployment}, _service(manifest)]


def _container(manifest: WorkspaceDocuments, placement: Placement, options: PodOptions) -> Object:
    preset = manifest.workspace.preset
    assert preset is not None, "load_server refuses other Workspaces"  # noqa: S101
    arguments = ["serve", str(files.FILE), "--port", str(POD_PORT), *options.flags]
    if placement.divided:
        arguments += ["--parallel", "tp"]
    made = pod.container("serve", preset, options, arguments)
    if options.api_key is not None:
        made["env"] = [*made.get("env", []), pod.secret_variable(API_KEY_VARIABLE, *options.api_key)]
    made["ports"] = [{"name": "http", "containerPort": POD_PORT}]
    made["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}}
    return made | _probes()


def _keys(made: Object, options: PodOptions) -> list[Object]:
    """Return the volume with the file of API keys, if there is one, and have the server read it.

    The whole Secret, not a `subPath` of it: that would never change in a pod that runs.
    """
    if options.api_key_file is None:
        return []
    name, key = options.api_key_file
    made["args"] += ["--api-key-file", str(KEYS / API_KEY_FILE)]
    items = [{"key": key, "path": API_KEY_FILE}]
    source = {"secret": {"secretName": name, "items": items, "defaultMode": 0o440}}
    return [pod.volume("api-keys", source, KEYS, made)]


def _adapters(inference: InferenceSpec, made: Object, options: PodOptions) -> tuple[list[Object], list[str]]:
    """Return the volumes of the adapters, and the Secrets with which images are pulled."""
    volumes, secrets = [], []
    for number, adapter in enumerate(inference.adapters):
        folder, name = Path("/mnt/adapter") / adapter.source.name, f"adapter-{number}"
        if adapter.source.volume is not None:
            volumes.append(pod.volume(name, adapter.source.volume, folder, made))
        elif options.image_volumes:
            source = {"image": {"reference": adapter.source.image, "pullPolicy": "IfNotPresent"}}
            volumes.append(pod.volume(name, source, folder, made, sub_path="data"))
        secrets += adapter.source.image_pull_secrets
    if not options.image_volumes:
        volumes += pod.registry_secrets(secrets, made)
    return volumes, list(dict.fromkeys(secrets))


def _probes() -> Object:
    """Return the probes: half an hour to load, then readiness by /readyz and restarts by /livez alone."""
    ready = {"httpGet": {"path": "/readyz", "port": "http"}}
    alive = {"httpGet": {"path": "/livez", "port": "http"}}
    return {
        "startupProbe": {**ready, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 3},
        "livenessProbe": {**alive, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
    }


def _service(manifest: WorkspaceDocuments) -> Object:
    spec: Object = {
        "selector": pod.selector(manifest),
        "ports": [{"name": "http", "port": ports.SERVING, "targetPort": "http"}],
    }
    if manifest.workspace.metadata.asks(LOAD_BALANCER):
        spec["type"] = "LoadBalancer"
    return {**pod.named("v1", "Service", manifest), "spec": spec}
