"""Files with Workspaces: which documents they hold, and the one that a command is about.

Knows kinds, lists and where fields belong; schema.py knows the fields. Start at `read`, which returns one
Workspace with its ConfigMaps, and `read_file`, which returns all that a file holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.config import describe, nearest, parse, read_text, without_nulls, yaml_documents
from runtime.errors import ConfigError
from runtime.files import kind_of
from runtime.workspace.schema import (
    API_VERSIONS,
    KUBECTL,
    OF_THE_CLUSTER,
    UNNAMED,
    ConfigMap,
    InferenceSet,
    InferenceSetSpec,
    Metadata,
    Workspace,
)

Document = Mapping[str, Any]
Work = Literal["tuning", "inference"]


@dataclass(frozen=True, slots=True)
class WorkspaceDocuments:
    """One Workspace of a file, and the ConfigMaps beside it."""

    file: Path
    workspace: Workspace
    config_maps: tuple[ConfigMap, ...]
    document: Document
    """The Workspace as it is written; of an InferenceSet, the one that each replica is."""
    replicas: int = 1
    """Equal Workspaces: above 1 only of an InferenceSet."""
    warnings: tuple[str, ...] = ()
    """What of the document itself has no effect."""

    @property
    def work(self) -> Work:
        return "tuning" if self.workspace.tuning is not None else "inference"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """All documents of a file."""

    workspaces: tuple[WorkspaceDocuments, ...]
    others: tuple[Document, ...]
    """Documents of other kinds (Secret, ConfigMap, PersistentVolumeClaim …), as they are written."""


def is_manifest(target: Path | str) -> bool:
    """Whether a command line's `target` names a file, rather than a model."""
    return kind_of(str(target)) == "file" or Path(target).suffix in (".yaml", ".yml", ".json")


def read(path: Path, work: Work = "tuning") -> WorkspaceDocuments:
    """Return the one Workspace of the file; of several, the one for `work`.

    A file with one Workspace returns it, whatever its work is: the caller knows what to say then.
    """
    workspaces = read_file(path).workspaces
    fitting = workspaces if len(workspaces) == 1 else [each for each in workspaces if each.work == work]
    if len(fitting) != 1:
        names = ", ".join(f"{each.workspace.metadata.name} ({each.work})" for each in workspaces)
        raise ConfigError(
            f"{path}: expected one Workspace with '{work}', found {names}; write each into a file of its own"
        )
    return fitting[0]


def read_file(path: Path) -> ManifestFile:
    """Return the Workspaces of the file, at least one, and its other documents; lists are taken apart."""
    documents = list(_flat(yaml_documents(read_text(path), str(path)), path))
    config_maps = tuple(config_map(d, str(path)) for d in documents if d["kind"] == "ConfigMap")
    workspaces = []
    for document in documents:
        if document["kind"] == "Workspace":
            workspaces.append(_workspace(document, path, config_maps))
        elif document["kind"] == "InferenceSet":
            workspaces.append(_of_inference_set(document, path, config_maps))
    if not workspaces:
        kinds = [" ".join(document["kind"].split()) for document in documents]
        hint = next(filter(None, (nearest(kind, ["Workspace", "InferenceSet"]) for kind in kinds)), "")
        found = ", ".join(kinds) or "nothing"
        raise ConfigError(f"{path}: expected one document with 'kind: Workspace', found {found}{hint}")
    others = tuple(d for d in documents if d["kind"] not in ("Workspace", "InferenceSet"))
    return ManifestFile(tuple(workspaces), others)


def config_map(document: Document, file: str) -> ConfigMap:
    """Return the ConfigMap of a document; ConfigError names it by its name."""
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return parse(ConfigMap, document, f"{file}: ConfigMap {name}" if name else f"{file}: ConfigMap")


def _flat(documents: Iterable[Document], path: Path) -> Iterator[Document]:
    """Yield the documents, those of a `kind: List` one by one; each has a kind."""
    for number, document in enumerate(documents, start=1):
        kind = document.get("kind")
        if not isinstance(kind, str) or not kind:
            raise ConfigError(f"{path}: document {number} {_without_kind(document)}")
        if kind.endswith("List") and "items" in document:
            items = document["items"] or []
            if not isinstance(items, list):
                raise ConfigError(f"{path}: 'items' of {kind} is {describe(items)}, expected documents")
            for item in items:
                if not isinstance(item, dict):
                    raise ConfigError(f"{path}: 'items' of {kind} holds {describe(item)}, expected documents")
            yield from _flat(items, path)
        else:
            yield document


def _without_kind(document: Document) -> str:
    """Return what is wrong with a document whose kind is not known, and what to do."""
    if document.get("kind") is not None:
        return f"has {describe(document['kind'])} as its 'kind', expected one such as 'kind: Workspace'"
    if "training_config" in document or "vllm" in document:
        return "has no 'kind'; it goes into a ConfigMap, or into a file of its own that --config names"
    misspelt = next((str(key) for key in document if str(key).lower() == "kind"), None)
    if misspelt is not None:
        return f"has the key {misspelt!r}, expected 'kind'"
    return "has no 'kind'; expected one such as 'kind: Workspace'"


def _workspace(
    document: Document, path: Path, config_maps: tuple[ConfigMap, ...], *, replicas: int = 1
) -> WorkspaceDocuments:
    version = document.get("apiVersion")
    if version not in API_VERSIONS:
        raise ConfigError(
            f"{path}: 'apiVersion' is {describe(version)}, expected {' or '.join(API_VERSIONS)}"
        )
    below = document.get("spec")
    if below is not None:
        fields = [f"'{key}'" for key in below] if isinstance(below, dict) else ["its fields"]
        raise ConfigError(
            f"{path}: a Workspace has no 'spec': write {', '.join(fields)} one level up, beside 'metadata'"
        )
    written = {key: value for key, value in document.items() if key != "spec"}  # without a value
    workspace = parse(Workspace, written, str(path))
    warnings = tuple(_of_metadata(workspace.metadata, path, status=workspace.status))
    return WorkspaceDocuments(path, workspace, config_maps, document, replicas, warnings)


def _of_metadata(metadata: Metadata, path: Path, *, status: Any = None) -> Iterator[str]:
    """Yield what a name was made of, and what has no effect because a cluster writes it."""
    written = [f"metadata.{field.alias or name}" for name, field in Metadata.model_fields.items()
               if name in OF_THE_CLUSTER and getattr(metadata, name)]  # fmt: skip
    written += [f"metadata.annotations {name}" for name in metadata.annotations if name.startswith(KUBECTL)]
    written += ["status"] if status else []
    if written:
        yield f"{path.name}: without effect, since a cluster writes it: {', '.join(written)}"
    if metadata.name == UNNAMED and "name" not in metadata.model_fields_set:
        yield f"{path.name}: 'metadata.name' is missing, so the name is {UNNAMED!r}"
    elif metadata.generate_name and metadata.name == metadata.generate_name.rstrip("-."):
        yield (
            f"{path.name}: 'metadata.generateName' is {metadata.generate_name!r}: the name is "
            f"{metadata.name!r}, with no random end"
        )


def _of_inference_set(
    document: Document, path: Path, config_maps: tuple[ConfigMap, ...]
) -> WorkspaceDocuments:
    """Return the Workspace that an InferenceSet makes `replicas` of."""
    parsed = parse(InferenceSet, document, str(path))
    spec, metadata = parsed.spec, parsed.metadata
    workspace = {
        "apiVersion": API_VERSIONS[-1],
        "kind": "Workspace",
        "metadata": without_nulls(
            {
                "name": metadata.name,
                "namespace": metadata.namespace or None,
                "labels": {**spec.template.metadata.labels, **metadata.labels} or None,
                "annotations": {**spec.template.metadata.annotations, **metadata.annotations} or None,
            }
        ),
        "resource": without_nulls(
            {
                "instanceType": spec.template.resource.instance_type or None,
                "labelSelector": spec.label_selector or None,
            }
        ),
        "inference": spec.template.inference,
    }
    made = _workspace(workspace, path, config_maps)
    replicas = min(spec.replicas, spec.node_count_limit or spec.replicas)
    warnings = (*_of_metadata(metadata, path, status=parsed.status), *_of_set(spec, path))
    return WorkspaceDocuments(path, made.workspace, config_maps, workspace, replicas, warnings)


def _of_set(spec: InferenceSetSpec, path: Path) -> Iterator[str]:
    """Yield what of an InferenceSet is carried out otherwise than by a controller."""
    placed = spec.template.metadata.model_fields_set - {"labels", "annotations"}
    if placed:
        fields = ", ".join(sorted(Metadata.model_fields[name].alias or name for name in placed))
        yield f"{path.name}: without effect in 'spec.template.metadata': {fields}"
    if 0 < spec.node_count_limit < spec.replicas:
        yield (
            f"{path.name}: 'spec.nodeCountLimit' is {spec.node_count_limit}: so many replicas, "
            f"not {spec.replicas}"
        )
    if spec.update_strategy not in ({}, {"type": "RollingUpdate"}):
        yield f"{path.name}: 'spec.updateStrategy' has no effect here: one pod is replaced at a time"
