"""The pod of a Job or a Deployment: its one container, its volumes, its requests.

Knows what tuning and serving have in common. Start at `container` and `pod`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.oci.access import MOUNTED_SECRETS
from runtime.workspace.kubernetes import files, nodes, secrets, text
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.schema import PresetSpec

Object = dict[str, Any]

USER = 10001
"""The image's own user."""
WEIGHTS = Path("/workspace/weights")
EXIT_MARGIN_S = 15
"""From the end of the work to the end of the process."""

CPUS_PER_GPU, GIB_PER_GPU = 2, 6
"""Requested for each process with a GPU: below what the smallest machines with one have (4 cores, 16 GiB),
above what the process itself takes (estimate: CUDA's and torch's libraries, one file of weights)."""
GIB_BESIDE_WEIGHTS = 4
"""Memory beside the weights on a CPU, and disk beside them in the cache (estimate)."""


@dataclass(frozen=True, slots=True)
class Accelerators:
    """What a pod requests, beside the quantities of `PodOptions`."""

    gpus: int
    resource: str
    weights_bytes: int | None
    """Size of the model's files; None where it is not known."""
    downloads: bool
    """Whether the pod fetches them."""
    copies: int = 1
    """Copies of the model in the pod."""


def container(name: str, preset: PresetSpec, options: PodOptions, arguments: list[str]) -> Object:
    """Return a container that may write to its volumes and nowhere else."""
    environ = []
    if preset.options.model_access_secret:
        environ.append(secret_variable("HF_TOKEN", preset.options.model_access_secret, "HF_TOKEN"))
    if options.config is not None:
        arguments = [*arguments, "--config", str(files.CONFIG_FILE)]
    return {
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


def secret_variable(name: str, secret: str, key: str) -> Object:
    """Return the environment variable `name` with the value of a Secret's `key`."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def downloads(manifest: WorkspaceDocuments) -> bool:
    """Whether the pod fetches the model's weights: there is no claim that holds them."""
    return manifest.workspace.preset is None or not manifest.workspace.preset.options.model_weights_pvc


def requests(accelerators: Accelerators, options: PodOptions) -> Object:
    """Return the resources of a container: processor, memory and disk as requests, GPUs as limits.

    GPUs cannot be overcommitted, so their request is their limit; nothing else has a limit, beyond which a
    pod would be killed or slowed.
    """
    gpus, weights = accelerators.gpus, accelerators.weights_bytes
    weights_gib = ceil(weights / 2**30) if weights is not None else 0
    # On a CPU weights are float32, twice the size of most files.
    memory_gib = GIB_PER_GPU * gpus if gpus else 2 * weights_gib * accelerators.copies + GIB_BESIDE_WEIGHTS
    requested = {
        "cpu": options.cpu or str(CPUS_PER_GPU * max(1, gpus)),
        "memory": options.memory or f"{memory_gib}Gi",
    }
    if weights_gib and accelerators.downloads and options.cache_claim is None:
        requested["ephemeral-storage"] = f"{weights_gib + GIB_BESIDE_WEIGHTS}Gi"
    return {"requests": requested, **({"limits": {accelerators.resource: gpus}} if gpus else {})}


def pod(
    manifest: WorkspaceDocuments, made: Object, volumes: list[Object], options: PodOptions, *, gpus: bool
) -> Object:
    """Return the pod of the container `made`, with its keys in the order of the printed file."""
    preset = manifest.workspace.preset
    assert preset is not None, "other Workspaces are refused"  # noqa: S101
    cache = (
        {"persistentVolumeClaim": {"claimName": options.cache_claim}}
        if options.cache_claim
        else {"emptyDir": {}}
    )
    shared = [
        volume("workspace", files.of(manifest, options).volume, files.FOLDER, made),
        volume("cache", cache, Path("/cache"), made),
        volume("shm", {"emptyDir": {"medium": "Memory"}}, Path("/dev/shm"), made),  # noqa: S108
    ]
    if preset.options.model_weights_pvc:
        claim = {"claimName": preset.options.model_weights_pvc, "readOnly": True}
        source, inside = {"persistentVolumeClaim": claim}, preset.options.model_weights_sub_path
        shared.append(volume("weights", source, WEIGHTS, made, sub_path=inside))
    paths = [mount["mountPath"] for mount in made["volumeMounts"]]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise ConfigError(f"{manifest.file}: two volumes at {twice}; let input and output differ")
    secrets = list(dict.fromkeys(preset.options.image_pull_secrets))
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": 0,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **nodes.selection(manifest.workspace.resource, gpus=gpus),
        **({"imagePullSecrets": [{"name": secret} for secret in secrets]} if secrets else {}),
        "containers": [made],
        "volumes": [*shared, *volumes],
    }


def volume(name: str, source: Object, folder: Path, made: Object, *, sub_path: str = "") -> Object:
    """Return the volume, mounted into the container `made` at `folder`."""
    mount = {"name": name, "mountPath": str(folder)}
    made["volumeMounts"].append(mount | ({"subPath": sub_path} if sub_path else {}))
    return {"name": name, **text.without_nulls(source)}


def registry_secrets(names: Iterable[str], made: Object) -> list[Object]:
    """Return a volume with the registries' credentials at the path where controllers mount them, if any."""
    sources = [
        {"secret": {"name": name, "items": [{"key": ".dockerconfigjson", "path": f"{name}.json"}]}}
        for name in dict.fromkeys(filter(None, names))
    ]
    if not sources:
        return []
    return [volume("registries", {"projected": {"sources": sources}}, MOUNTED_SECRETS, made)]


# --- what every object has ---------------------------------------------------------------------


def named(version: str, kind: str, manifest: WorkspaceDocuments, *, name: str = "") -> Object:
    """Return an object with its metadata alone; `name` replaces the Workspace's."""
    metadata = manifest.workspace.metadata
    own = {
        key: value
        for key, value in metadata.annotations.items()
        if not is_of_a_controller(key) and not any(secrets.places({key: value}))
    }
    described: Object = {"name": name or metadata.name}
    if metadata.namespace:
        described["namespace"] = metadata.namespace
    described["labels"] = labels(manifest)
    if own:
        described["annotations"] = own
    return {"apiVersion": version, "kind": kind, "metadata": described}


def labels(manifest: WorkspaceDocuments) -> Object:
    """Return the Workspace's own labels, with those that select its pods."""
    return {**manifest.workspace.metadata.labels, **selector(manifest)}


def selector(manifest: WorkspaceDocuments) -> Object:
    """Return the labels that select the Workspace's pods."""
    return {
        "app.kubernetes.io/name": "workspace-runtime",
        "app.kubernetes.io/instance": manifest.workspace.metadata.name,
        "app.kubernetes.io/component": manifest.work,
    }


def is_of_a_controller(annotation: str) -> bool:
    """Whether an annotation is for kubectl or KAITO's controller, so that no object is given it."""
    prefix = annotation.partition("/")[0]
    return prefix == "kubectl.kubernetes.io" or prefix.endswith(("kaito.sh", "kaito.io"))
