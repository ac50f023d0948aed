"""`kind: Workspace` as its users write it (kaito.sh/v1alpha1 and v1beta1), read strictly.

Knows the schema and its rules, not what each value is used for. Start at `read`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from runtime.config import Strict, describe, nearest, parse, read_text, yaml_documents
from runtime.errors import ConfigError

API_VERSIONS = ("kaito.sh/v1alpha1", "kaito.sh/v1beta1")


class Metadata(Strict):
    """Object metadata; what a cluster adds (uid, managedFields …) is accepted and ignored."""

    model_config = {"extra": "ignore"}

    name: str = Field("workspace", min_length=1, max_length=253)
    annotations: dict[str, str] = {}


class PresetOptions(Strict):
    """Where a controller gets the model's image and weights; nothing here changes what this image does."""

    image: str = ""
    image_pull_secrets: list[str] = Field([], alias="imagePullSecrets")
    model_access_secret: str = Field("", alias="modelAccessSecret")
    model_weights_pvc: str = Field("", alias="modelWeightsPVC")
    model_weights_sub_path: str = Field("", alias="modelWeightsSubPath")


class PresetSpec(Strict):
    """Which model."""

    name: str
    access_mode: Literal["public", "private"] | None = Field(None, alias="accessMode")
    options: PresetOptions = Field(PresetOptions(), alias="presetOptions")


class Source(Strict):
    """Where data or an adapter comes from."""

    name: str = ""
    urls: list[str] = []
    image: str = ""
    volume: dict[str, Any] | None = Field(None, alias="volumeSource")
    image_pull_secrets: list[str] = Field([], alias="imagePullSecrets")

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"holds {describe(url)}, expected addresses with http:// or https://")
        return urls


class Destination(Strict):
    """Where the adapter goes."""

    image: str = ""
    image_push_secret: str = Field("", alias="imagePushSecret")
    volume: dict[str, Any] | None = Field(None, alias="volumeSource")

    @model_validator(mode="after")
    def _one_of(self) -> "Destination":
        if bool(self.image) == (self.volume is not None):
            raise ValueError("must have exactly one of 'image' and 'volumeSource'")
        return self


class TuningSpec(Strict):
    """A tuning job."""

    preset: PresetSpec
    method: Literal["lora", "qlora"] | None = None
    config: str = ""
    input: Source
    output: Destination

    @field_validator("method", mode="before")
    @classmethod
    def _any_case(cls, method: object) -> object:
        return method.lower() if isinstance(method, str) else method

    @model_validator(mode="after")
    def _one_input(self) -> "TuningSpec":
        if sum((bool(self.input.urls), bool(self.input.image), self.input.volume is not None)) != 1:
            raise ValueError("'input' must have exactly one of 'urls', 'image' and 'volumeSource'")
        return self


class AdapterSpec(Strict):
    """One adapter of an inference service."""

    source: Source
    strength: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _image_or_volume(self) -> "AdapterSpec":
        if self.source.urls:
            raise ValueError("'source.urls' is not possible for an adapter; use 'image' or 'volumeSource'")
        if bool(self.source.image) == (self.source.volume is not None):
            raise ValueError("'source' must have exactly one of 'image' and 'volumeSource'")
        if not self.source.name:
            raise ValueError("'source.name' is missing; clients select the adapter by it")
        return self


class InferenceSpec(Strict):
    """An inference service."""

    preset: PresetSpec | None = None
    template: dict[str, Any] | None = None
    config: str = ""
    adapters: list[AdapterSpec] = Field([], max_length=10)

    @field_validator("adapters")
    @classmethod
    def _unique(cls, adapters: list[AdapterSpec]) -> list[AdapterSpec]:
        names = [adapter.source.name for adapter in adapters]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"holds two adapters named {twice!r}, expected different names")
        return adapters


class LabelSelector(Strict):
    """Labels of the nodes to run on."""

    match_labels: dict[str, str] = Field({}, alias="matchLabels")
    match_expressions: list[dict[str, Any]] = Field([], alias="matchExpressions")


class Resource(Strict):
    """Machines to run on: read by `runtime manifest` and `runtime plan`, elsewhere only for warnings."""

    count: int = Field(1, ge=1)
    instance_type: str = Field("", alias="instanceType")
    label_selector: LabelSelector | None = Field(None, alias="labelSelector")
    preferred_nodes: list[str] = Field([], alias="preferredNodes")


class Workspace(Strict):
    """The manifest. Both API versions have the same fields, at the top level."""

    api_version: Literal["kaito.sh/v1alpha1", "kaito.sh/v1beta1"] = Field(alias="apiVersion")
    kind: Literal["Workspace"]
    metadata: Metadata = Metadata()
    resource: Resource = Resource()
    tuning: TuningSpec | None = None
    inference: InferenceSpec | None = None
    status: Any = None

    @model_validator(mode="after")
    def _tuning_or_inference(self) -> "Workspace":
        if (self.tuning is None) == (self.inference is None):
            raise ValueError("must have exactly one of 'tuning' and 'inference'")
        return self


class ConfigMap(Strict):
    """A ConfigMap; only its name and its texts are read."""

    model_config = {"extra": "ignore"}

    metadata: Metadata = Metadata()
    data: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class WorkspaceDocuments:
    """A manifest file: its one Workspace and the ConfigMaps beside it."""

    file: Path
    workspace: Workspace
    config_maps: tuple[ConfigMap, ...]


def is_manifest(target: Path | str) -> bool:
    """Whether a command line's `target` names a file, rather than a model."""
    return Path(target).is_file() or Path(target).suffix in (".yaml", ".yml", ".json")


def read(path: Path) -> WorkspaceDocuments:
    """Return the one Workspace of the file and its ConfigMaps; documents of other kinds are ignored."""
    documents = yaml_documents(read_text(path), str(path))
    kinds = [str(document.get("kind", "")) for document in documents]
    workspaces = [document for document in documents if document.get("kind") == "Workspace"]
    if len(workspaces) != 1:
        found = ", ".join(kind or "a document without kind" for kind in kinds) or "nothing"
        hint = next(filter(None, (nearest(kind, ["Workspace"]) for kind in kinds)), "")
        raise ConfigError(f"{path}: expected one document with 'kind: Workspace', found {found}{hint}")
    version = workspaces[0].get("apiVersion")
    if version not in API_VERSIONS:
        raise ConfigError(
            f"{path}: 'apiVersion' is {describe(version)}, expected {' or '.join(API_VERSIONS)}"
        )
    workspace = parse(Workspace, workspaces[0], str(path))
    config_maps = (parse(ConfigMap, d, str(path)) for d in documents if d.get("kind") == "ConfigMap")
    return WorkspaceDocuments(path, workspace, tuple(config_maps))


def host_path(volume: Mapping[str, Any]) -> Path | None:
    """Return the directory of a hostPath volume, the one kind that exists outside a cluster too."""
    described = volume.get("hostPath")
    path = described.get("path") if isinstance(described, Mapping) else None
    return Path(path) if isinstance(path, str) and path else None
