"""All objects of a manifest file, in the order in which a cluster needs them.

The Workspace itself goes, with its configuration and nothing else of the file, into a ConfigMap, or a Secret
where it holds one. The pod reads it with `runtime tune FILE` or `runtime serve FILE`; other documents are
passed on. Start at `objects`.
"""

from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ConfigError, Failure
from runtime.memory import shape
from runtime.model_source import ModelSource
from runtime.serving.settings import ServeConfig
from runtime.tuning.settings import TuningJob
from runtime.workspace import config_maps
from runtime.workspace.jobs import load_job
from runtime.workspace.kubernetes import checks, files, placement, pod
from runtime.workspace.kubernetes.deployment import objects_of_server
from runtime.workspace.kubernetes.files import PodFiles
from runtime.workspace.kubernetes.job import objects_of_job
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.kubernetes.pod import Object
from runtime.workspace.layers import Resolved
from runtime.workspace.manifest import ManifestFile, WorkspaceDocuments, read_file
from runtime.workspace.servers import load_server

READS = "workspace-runtime/reads"
"""Annotation of a pod: digest of the ConfigMap or Secret that it reads."""
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
    passed_on = list(_passed_on(found, options))
    made, warnings = [], [*checks.wrong_secrets(passed_on), *checks.exposed(passed_on)]
    for manifest in found.workspaces:
        its, said = _workspace(manifest, found, options)
        made += its
        warnings += said
    for document in found.others:
        if str(document.get("apiVersion")).startswith("kaito.sh/"):
            warnings.append(f"{file.name}: {document['kind']} is left out: it needs the controller")
    return [*passed_on, *made], tuple(dict.fromkeys(warnings))


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
    keyed = options.api_key is not None or options.api_key_file is not None
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
        keyed = keyed or server.config.api_key is not None or server.config.api_key_file is not None
        placed = placement.of_server(manifest, server.config, options)
        size = _weights_bytes(server.config.model)
        made = objects_of_server(manifest, server.config, placed, options, weights_bytes=size)
    read = files.of(manifest, options)
    _restart_with(read, made)
    ineffective = checks.ineffective(manifest, options, gpus=placed.gpus > 0, keyed=keyed)
    warnings = [*resolved.warnings, *resolved.unfilled, *placed.warnings, *ineffective, *read.warnings]
    described = pod.named("v1", read.kind, manifest, name=files.name(manifest))
    return [{**described, **read.content}, *made], warnings


def _restart_with(read: PodFiles, made: list[Object]) -> None:
    """Have the pods of a Deployment replaced when what they read changes: they read it once."""
    for deployment in (each for each in made if each["kind"] == "Deployment"):
        deployment["spec"]["template"]["metadata"]["annotations"] = {READS: read.digest}


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


def _passed_on(found: ManifestFile, options: PodOptions) -> Iterator[Object]:
    """Yield the file's other documents, those without a namespace in the Workspaces' own."""
    namespaces = {each.workspace.metadata.namespace for each in found.workspaces}
    namespace = namespaces.pop() if len(namespaces) == 1 else ""
    embedded = set()
    for each in found.workspaces if options.config is None else ():
        beside = config_maps.chosen(each, files.key(each))
        embedded |= {(beside.metadata.namespace, beside.metadata.name)} if beside else set()
    for document in found.others:
        metadata = document.get("metadata")
        written = dict(metadata) if isinstance(metadata, dict) else {}
        if str(document.get("apiVersion")).startswith("kaito.sh/"):
            continue
        if not isinstance(written.get("name"), str) and not written.get("generateName"):
            file = found.workspaces[0].file
            raise ConfigError(f"{file}: {document['kind']} has no 'metadata.name', which Kubernetes needs")
        if (
            document["kind"] == "ConfigMap"
            and (written.get("namespace") or "", written.get("name")) in embedded
        ):
            continue
        if namespace and not written.get("namespace") and document["kind"] not in CLUSTER_SCOPED:
            written["namespace"] = namespace
        yield {**document, "metadata": written}
