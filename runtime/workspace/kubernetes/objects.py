"""All objects of a manifest file, in the order in which a cluster needs them.

The Workspace itself goes, with its configuration and nothing else of the file, into a ConfigMap, which the
pod reads with `runtime tune FILE` or `runtime serve FILE`; other documents are passed on. Start at `objects`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ConfigError, Failure
from runtime.memory import shape
from runtime.model_source import ModelSource
from runtime.serving.settings import ServeConfig
from runtime.tuning.settings import TuningJob
from runtime.workspace import config_maps, sections, servers
from runtime.workspace.jobs import load_job
from runtime.workspace.kubernetes import checks, placement, pod, text
from runtime.workspace.kubernetes.deployment import objects_of_server
from runtime.workspace.kubernetes.job import objects_of_job
from runtime.workspace.kubernetes.names import LARGEST_CONFIG_MAP
from runtime.workspace.kubernetes.pod import CONFIG_FILE, FILE, Object, PodOptions
from runtime.workspace.layers import Resolved
from runtime.workspace.manifest import ManifestFile, WorkspaceDocuments, read_file
from runtime.workspace.servers import load_server

READS = "workspace-runtime/reads"
"""Annotation of a pod: digest of the ConfigMap that it reads."""
_CLUSTER_SCOPED = (
    "ClusterRole ClusterRoleBinding CustomResourceDefinition Namespace PersistentVolume PriorityClass "
    "RuntimeClass StorageClass"
)
CLUSTER_SCOPED = frozenset(_CLUSTER_SCOPED.split())
"""Kinds of objects without a namespace."""


def objects(file: Path, options: PodOptions) -> tuple[list[Object], tuple[str, ...]]:
    """Return the objects of the Workspaces in `file`, and warnings for the user.

    Raises ConfigError for what the pods or the cluster would refuse, CapacityError for what does not fit.
    """
    found = read_file(file)
    _refuse_together(found, options)
    made, warnings = [], list(checks.wrong_secrets(found.others))
    for manifest in found.workspaces:
        its, said = _workspace(manifest, found, options)
        made += its
        warnings += said
    for document in found.others:
        if str(document.get("apiVersion")).startswith("kaito.sh/"):
            warnings.append(f"{file.name}: {document['kind']} is left out: it needs the controller")
    return [*_passed_on(found, options), *made], tuple(dict.fromkeys(warnings))


def _refuse_together(found: ManifestFile, options: PodOptions) -> None:
    names = [(each.workspace.metadata.namespace, each.workspace.metadata.name) for each in found.workspaces]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"{found.workspaces[0].file}: two Workspaces are named {twice[1]!r}")
    if options.config is not None and len(names) > 1:
        raise ConfigError(f"--config {options.config}: the file holds {len(names)} Workspaces, expected one")


def _workspace(
    manifest: WorkspaceDocuments, found: ManifestFile, options: PodOptions
) -> tuple[list[Object], list[str]]:
    environ = _environ(manifest)
    resolved: Resolved[TuningJob] | Resolved[ServeConfig]
    if manifest.work == "tuning":
        resolved = job = load_job(manifest, environ=environ, config=options.config)
        checks.refuse(manifest, found.others, options)
        placed = placement.of_job(manifest, job.config, options)
        size = _weights_bytes(job.config.model)
        made = objects_of_job(manifest, job.config, placed, options, weights_bytes=size)
    else:
        settings = options.settings
        resolved = server = load_server(manifest, environ=environ, config=options.config, overrides=settings)
        checks.refuse(manifest, found.others, options)
        placed = placement.of_server(manifest, server.config, options)
        size = _weights_bytes(server.config.model)
        made = objects_of_server(manifest, server.config, placed, options, weights_bytes=size)
    map_ = _config_map(manifest, options)
    _restart_with(map_, made)
    ineffective = checks.ineffective(manifest, options, gpus=placed.gpus > 0)
    warnings = [*resolved.warnings, *resolved.placeholders, *placed.warnings, *ineffective]
    return [map_, *made], warnings


def _restart_with(map_: Object, made: list[Object]) -> None:
    """Have the pods of a Deployment replaced when what they read changes: they read it once."""
    digest = hashlib.sha256(repr(sorted(map_["data"].items())).encode()).hexdigest()
    for deployment in (each for each in made if each["kind"] == "Deployment"):
        deployment["spec"]["template"]["metadata"]["annotations"] = {READS: digest}


def _environ(manifest: WorkspaceDocuments) -> dict[str, str]:
    """Return the environment of the pod, as far as settings depend on it."""
    preset = manifest.workspace.preset
    token = {"HF_TOKEN": "in a Secret"} if preset and preset.options.model_access_secret else {}
    return {"KUBERNETES_SERVICE_HOST": "a pod's own", **token}


def _weights_bytes(model: ModelSource) -> int | None:
    """Return the size of the model's files; None where it is not known without the hub."""
    try:
        return shape.of(model).stored_bytes
    except Failure:
        return None


def _config_map(manifest: WorkspaceDocuments, options: PodOptions) -> Object:
    """Return the ConfigMap with the Workspace and its configuration, as the pod's command reads them."""
    key, beside = _key(manifest), config_maps.chosen(manifest, _key(manifest))
    documents: list[Object] = [_read_by_the_pod(manifest)]
    data = {}
    if options.config is not None:
        data[CONFIG_FILE.name] = text.dump([config_maps.read(options.config, key).values])
    elif beside is not None:
        metadata = {"name": beside.metadata.name}
        config = {key: beside.data[key]} if key in beside.data else {}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": config})
    data = {FILE.name: text.dump(documents), **data}
    size = sum(len(content.encode()) for content in data.values())
    if size > LARGEST_CONFIG_MAP:
        raise ConfigError(
            f"{manifest.file}: {size} bytes, expected at most {LARGEST_CONFIG_MAP} of a ConfigMap"
        )
    return {**pod.named("v1", "ConfigMap", manifest, name=pod.map_name(manifest)), "data": data}


def _key(manifest: WorkspaceDocuments) -> str:
    return sections.KEY if manifest.work == "tuning" else servers.INFERENCE_KEY


def _read_by_the_pod(manifest: WorkspaceDocuments) -> Object:
    """Return the Workspace without what the cluster or the user wrote for others."""
    metadata = manifest.workspace.metadata
    annotations = {key: value for key, value in metadata.annotations.items() if key.startswith("kaito.sh/")}
    kept = {name: manifest.document.get(name) for name in ("resource", "tuning", "inference")}
    described = {
        "name": metadata.name,
        "namespace": metadata.namespace or None,
        "annotations": annotations or None,
    }
    whole = {
        "apiVersion": manifest.workspace.api_version, "kind": "Workspace", "metadata": described, **kept,
    }  # fmt: skip
    cleaned: Object = pod.without_nulls(whole)
    return cleaned


def _passed_on(found: ManifestFile, options: PodOptions) -> Iterator[Object]:
    """Yield the file's other documents, those without a namespace in the Workspaces' own."""
    namespaces = {each.workspace.metadata.namespace for each in found.workspaces}
    namespace = namespaces.pop() if len(namespaces) == 1 else ""
    embedded = set()
    for each in found.workspaces if options.config is None else ():
        beside = config_maps.chosen(each, _key(each))
        embedded |= {(beside.metadata.namespace, beside.metadata.name)} if beside else set()
    for document in found.others:
        metadata = document.get("metadata")
        written = dict(metadata) if isinstance(metadata, dict) else {}
        if str(document.get("apiVersion")).startswith("kaito.sh/"):
            continue
        if (
            document["kind"] == "ConfigMap"
            and (written.get("namespace") or "", written.get("name")) in embedded
        ):
            continue
        if namespace and not written.get("namespace") and document["kind"] not in CLUSTER_SCOPED:
            written["namespace"] = namespace
        yield {**document, "metadata": written}
