"""The files that a pod reads, its Workspace and configuration: a ConfigMap, or a Secret where they hold one.

Nothing else of the user's file is in them, nor any comment. Start at `of`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.workspace import config_maps, sections, servers
from runtime.workspace.kubernetes import secrets, text
from runtime.workspace.kubernetes.names import LARGEST_CONFIG_MAP
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.schema import RUNTIME

Object = dict[str, Any]

FOLDER = Path("/etc/workspace")
FILE = FOLDER / "workspace.yaml"
CONFIG_FILE = FOLDER / "config.yaml"
"""Where the pod reads its manifest, and the configuration that --config gave."""


@dataclass(frozen=True, slots=True)
class PodFiles:
    """The files of one Workspace's pods, and the object that holds them."""

    name: str
    texts: dict[str, str]
    secrets: tuple[str, ...]
    """Where in them secrets are."""

    @property
    def kind(self) -> str:
        """Kind of the object."""
        return "Secret" if self.secrets else "ConfigMap"

    @property
    def content(self) -> Object:
        """What the object has beside its metadata."""
        return {"type": "Opaque", "stringData": self.texts} if self.secrets else {"data": self.texts}

    @property
    def volume(self) -> Object:
        """The volume source with the files."""
        secret, map_ = {"secret": {"secretName": self.name}}, {"configMap": {"name": self.name}}
        return secret if self.secrets else map_

    @property
    def digest(self) -> str:
        """Digest of the files, which changes with them."""
        return hashlib.sha256(repr(sorted(self.texts.items())).encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know of the secrets."""
        if not self.secrets:
            return ()
        return (
            f"secrets are in {', '.join(self.secrets)}: the pod reads Secret {self.name} in place of a "
            "ConfigMap; keep these objects where nobody else reads them",
        )


def of(manifest: WorkspaceDocuments, options: PodOptions) -> PodFiles:
    """Return the files with which the pod's command runs what the Workspace describes."""
    workspace = _workspace(manifest)
    documents, texts = [workspace], {}
    beside = config_maps.chosen(manifest, key(manifest)) if options.config is None else None
    where, config = "", {}
    if options.config is not None:
        where = f"--config {options.config}"
        config = config_maps.read(options.config, key(manifest)).values
        texts[CONFIG_FILE.name] = text.dump([config])
    elif beside is not None:
        named = beside.metadata.name
        where = f"ConfigMap {named}"
        config = config_maps.of(beside, key(manifest), str(manifest.file)).values
        workspace[manifest.work]["config"] = named
        data = {key(manifest): text.dump([config])}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": named}, "data": data})
    texts = {FILE.name: text.dump(documents), **texts}
    size = sum(len(content.encode()) for content in texts.values())
    if size > LARGEST_CONFIG_MAP:
        raise ConfigError(
            f"{manifest.file}: {size} bytes, expected at most {LARGEST_CONFIG_MAP} of a ConfigMap"
        )
    held = (*secrets.places(workspace), *(f"{where} {place}" for place in secrets.places(config)))
    return PodFiles(name(manifest), texts, held)


def name(manifest: WorkspaceDocuments) -> str:
    """Return the name of the object with the files."""
    return f"{manifest.workspace.metadata.name}-workspace"


def key(manifest: WorkspaceDocuments) -> str:
    """Return under which key a ConfigMap holds the configuration of such work."""
    return sections.KEY if manifest.work == "tuning" else servers.INFERENCE_KEY


def _workspace(manifest: WorkspaceDocuments) -> Object:
    """Return the Workspace without what the cluster or the user wrote for others."""
    metadata = manifest.workspace.metadata
    runtime = metadata.annotations.get(RUNTIME)
    kept = {name: manifest.document.get(name) for name in ("resource", "tuning", "inference")}
    described = {
        "name": metadata.name,
        "namespace": metadata.namespace or None,
        "annotations": {RUNTIME: runtime} if runtime else None,
    }
    whole = {
        "apiVersion": manifest.workspace.api_version, "kind": "Workspace", "metadata": described, **kept,
    }  # fmt: skip
    cleaned: Object = text.without_nulls(whole)
    return cleaned
