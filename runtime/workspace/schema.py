"""`kind: Workspace`, `InferenceSet` and `ConfigMap` as their users write them (kaito.sh/v1alpha1, v1beta1).

Knows the fields and their rules, not files (manifest.py) and not what each value is used for. Start at
`Workspace`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from runtime.config import Sparse, describe, without_nulls
from runtime.serving.settings import ADAPTER_NAME

API_VERSIONS = ("kaito.sh/v1alpha1", "kaito.sh/v1beta1")

ApiVersion = Literal["kaito.sh/v1alpha1", "kaito.sh/v1beta1"]
Texts = Annotated[
    dict[str, str], BeforeValidator(lambda value: without_nulls(value) if isinstance(value, dict) else value)
]
"""Keys and texts; a key without a value is absent."""


LARGEST_INT32 = (1 << 31) - 1


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}, expected a number")  # noqa: TRY004 - pydantic wants it
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=LARGEST_INT32)]
"""How many of something, by Kubernetes' type for it."""

UNNAMED = "workspace"
MOST_ADAPTERS = 10
"""Of one Workspace, by KAITO's schema."""

LOAD_BALANCER = "kaito.sh/enablelb"
BYPASS = "kaito.sh/bypass-resource-checks"
RUNTIME = "kaito.sh/runtime"
"""Annotations that ask for an address outside the cluster, vouch for the memory, and name a runtime."""
_SWITCHES = (LOAD_BALANCER, BYPASS, "kaito.sh/disable-benchmark")
_TRUE, _FALSE = ("1", "t", "true"), ("0", "f", "false")


class Metadata(Sparse):
    """Object metadata."""

    name: str = Field(UNNAMED, min_length=1, max_length=253)
    generate_name: str = Field("", alias="generateName")
    namespace: str = ""
    labels: Texts = {}
    annotations: Texts = {}
    uid: Any = None
    """Written by the cluster, like all below."""
    generation: Any = None
    resource_version: Any = Field(None, alias="resourceVersion")
    self_link: Any = Field(None, alias="selfLink")
    creation_timestamp: Any = Field(None, alias="creationTimestamp")
    deletion_timestamp: Any = Field(None, alias="deletionTimestamp")
    deletion_grace_period_seconds: Any = Field(None, alias="deletionGracePeriodSeconds")
    finalizers: Any = None
    owner_references: Any = Field(None, alias="ownerReferences")
    managed_fields: Any = Field(None, alias="managedFields")

    def asks(self, annotation: str) -> bool:
        """Whether the annotation is true, in any of Go's spellings."""
        return self.annotations.get(annotation, "").lower() in _TRUE

    @field_validator("annotations")
    @classmethod
    def _values_that_mean_something(cls, annotations: dict[str, str]) -> dict[str, str]:
        expected = dict.fromkeys(_SWITCHES, "true or false") | {RUNTIME: "vllm or transformers"}
        known = dict.fromkeys(_SWITCHES, (*_TRUE, *_FALSE)) | {RUNTIME: ("vllm", "transformers")}
        for name, values in known.items():
            if annotations.get(name) and annotations[name].lower() not in values:
                raise ValueError(f"has {name} {describe(annotations[name])}, expected {expected[name]}")
        return annotations

    @model_validator(mode="before")
    @classmethod
    def _name_from_prefix(cls, data: Any) -> Any:
        prefix = data.get("generateName") if isinstance(data, dict) else None
        if isinstance(prefix, str) and prefix.rstrip("-.") and not data.get("name"):
            return {**data, "name": prefix.rstrip("-.")}
        return data


KUBECTL = "kubectl.kubernetes.io/"
"""Beginning of annotations that kubectl writes for itself."""
_PLACED = {"name", "generate_name", "namespace", "labels", "annotations"}
OF_THE_CLUSTER = frozenset(Metadata.model_fields) - _PLACED
"""Fields of the metadata that a cluster writes."""


class PresetOptions(Sparse):
    """Where a cluster has the model's image and weights: for `runtime manifest`, elsewhere for warnings."""

    image: str = ""
    image_pull_secrets: list[str] = Field([], alias="imagePullSecrets")
    model_access_secret: str = Field("", alias="modelAccessSecret")
    model_weights_pvc: str = Field("", alias="modelWeightsPVC")
    model_weights_sub_path: str = Field("", alias="modelWeightsSubPath")

    @model_validator(mode="after")
    def _path_of_a_claim(self) -> "PresetOptions":
        if self.model_weights_sub_path and not self.model_weights_pvc:
            raise ValueError("has 'modelWeightsSubPath' without 'modelWeightsPVC', the claim that holds it")
        return self


class PresetSpec(Sparse):
    """Which model."""

    name: str = Field(min_length=1)
    access_mode: Literal["public", "private"] | None = Field(None, alias="accessMode")
    options: PresetOptions = Field(PresetOptions(), alias="presetOptions")


class Source(Sparse):
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
            if not _is_address(url):
                raise ValueError(
                    f"holds {describe(url)}, expected addresses with http:// or https://, without spaces"
                )
        return urls


def _is_address(url: str) -> bool:
    """Whether `url` can be requested; pods get several of them, divided by spaces."""
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not re.search(r"\s", url)
        )
    except ValueError:  # brackets that do not close, a port that is none
        return False


class Destination(Sparse):
    """Where the adapter goes."""

    image: str = ""
    image_push_secret: str = Field("", alias="imagePushSecret")
    volume: dict[str, Any] | None = Field(None, alias="volumeSource")

    @model_validator(mode="after")
    def _one_of(self) -> "Destination":
        if bool(self.image) == (self.volume is not None):
            raise ValueError("must have exactly one of 'image' and 'volumeSource'")
        return self


class TuningSpec(Sparse):
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


class AdapterSpec(Sparse):
    """One adapter of an inference service."""

    source: Source
    strength: Annotated[float, BeforeValidator(_no_boolean)] = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _image_or_volume(self) -> "AdapterSpec":
        if self.source.urls:
            raise ValueError("'source.urls' is not possible for an adapter; use 'image' or 'volumeSource'")
        if bool(self.source.image) == (self.source.volume is not None):
            raise ValueError("'source' must have exactly one of 'image' and 'volumeSource'")
        if not self.source.name:
            raise ValueError("'source.name' is missing; clients select the adapter by it")
        if not re.fullmatch(ADAPTER_NAME, self.source.name):
            raise ValueError(
                f"'source.name' is {describe(self.source.name)}, expected letters, digits, '.', '_' and '-'"
            )
        return self


class InferenceSpec(Sparse):
    """An inference service."""

    preset: PresetSpec | None = None
    template: dict[str, Any] | None = None
    config: str = ""
    adapters: list[AdapterSpec] = []

    @model_validator(mode="after")
    def _preset_or_template(self) -> "InferenceSpec":
        if self.preset is not None and self.template is not None:
            raise ValueError("has both 'preset' and 'template', expected one of them")
        return self

    @field_validator("adapters")
    @classmethod
    def _unique(cls, adapters: list[AdapterSpec]) -> list[AdapterSpec]:
        if len(adapters) > MOST_ADAPTERS:
            raise ValueError(f"holds {len(adapters)} adapters, expected {MOST_ADAPTERS} at most")
        names = [adapter.source.name for adapter in adapters]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"holds two adapters named {twice!r}, expected different names")
        return adapters


class LabelExpression(Sparse):
    """A condition on one label of a node."""

    key: str = Field(min_length=1)
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []

    @model_validator(mode="after")
    def _values_where_compared(self) -> "LabelExpression":
        compares = self.operator in ("In", "NotIn")
        if compares != bool(self.values):
            expected = "one or more 'values'" if compares else "no 'values'"
            raise ValueError(f"has operator {self.operator}, which goes with {expected}")
        return self


class LabelSelector(Sparse):
    """Labels of the nodes to run on."""

    match_labels: Texts = Field({}, alias="matchLabels")
    match_expressions: list[LabelExpression] = Field([], alias="matchExpressions")


class Partition(Sparse):
    """A part of a node's GPUs: slices of one (mig), or some of several (accelerator)."""

    mode: Literal["mig", "accelerator"]
    count: Count = 1
    profile: str = ""
    """Name of a MIG slice, such as 2g.24gb."""

    @field_validator("profile")
    @classmethod
    def _of_a_slice(cls, profile: str) -> str:
        if profile and not re.fullmatch(r"[1-9]\d*g\.[1-9]\d*gb(?:[+.][a-z.]+)?", profile):
            raise ValueError(f"is {describe(profile)}, expected a MIG slice such as 1g.10gb")
        return profile

    @property
    def gigabytes(self) -> int:
        """Memory of a MIG slice, as its profile says it."""
        return int(re.split(r"[.g]", self.profile)[2])

    @model_validator(mode="after")
    def _profile_of_a_slice(self) -> "Partition":
        if (self.mode == "mig") != bool(self.profile):
            expected = "a 'profile' such as 1g.10gb" if self.mode == "mig" else "no 'profile'"
            raise ValueError(f"has mode {self.mode}, which goes with {expected}")
        return self


class Resource(Sparse):
    """Machines to run on: read by `runtime manifest` and `runtime plan`, elsewhere only for warnings."""

    count: Count = 1
    instance_type: str = Field("", alias="instanceType")
    label_selector: LabelSelector | None = Field(None, alias="labelSelector")
    preferred_nodes: list[str] = Field([], alias="preferredNodes")
    partition: Partition | None = None


class Workspace(Sparse):
    """The manifest. Both API versions have the same fields, at the top level."""

    api_version: ApiVersion = Field(alias="apiVersion")
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

    @model_validator(mode="after")
    def _whole_gpus_for_tuning(self) -> "Workspace":
        if self.tuning is not None and self.resource.partition is not None:
            raise ValueError(
                "has 'tuning' with 'resource.partition', and only 'inference' runs on part of a GPU"
            )
        return self

    @property
    def preset(self) -> PresetSpec | None:
        """The model, of whichever work it is for."""
        work = self.tuning or self.inference
        return work.preset if work else None


class InferenceSetResource(Sparse):
    """Machines of each replica."""

    instance_type: str = Field("", alias="instanceType")


class InferenceSetTemplate(Sparse):
    """The Workspace that each replica is."""

    metadata: Metadata = Metadata()
    resource: InferenceSetResource = InferenceSetResource()
    inference: dict[str, Any]


class InferenceSetSpec(Sparse):
    """How many of which Workspace."""

    template: InferenceSetTemplate
    replicas: Count = 1
    node_count_limit: int = Field(0, ge=0, alias="nodeCountLimit")
    """Most nodes of all replicas; 0 is no limit."""
    label_selector: dict[str, Any] = Field({}, alias="labelSelector")
    update_strategy: dict[str, Any] = Field({}, alias="updateStrategy")


class InferenceSet(Sparse):
    """Several equal inference Workspaces."""

    api_version: ApiVersion = Field(alias="apiVersion")
    kind: Literal["InferenceSet"]
    metadata: Metadata = Metadata()
    spec: InferenceSetSpec
    status: Any = None


class ConfigMap(Sparse):
    """A ConfigMap; only its name and its texts are read."""

    model_config = {"extra": "ignore"}

    metadata: Metadata
    data: Texts = {}

    @field_validator("metadata")
    @classmethod
    def _named(cls, metadata: Metadata) -> Metadata:
        if metadata.name == UNNAMED and "name" not in metadata.model_fields_set:
            raise ValueError("has no 'name', which a Workspace names it by")
        return metadata

    @field_validator("data", mode="before")
    @classmethod
    def _texts(cls, data: object) -> object:
        if isinstance(data, dict):
            for key, value in data.items():
                if value is not None and not isinstance(value, str):
                    hint = f"write '{key}: |' before it" if isinstance(value, dict | list) else "quote it"
                    raise ValueError(f"has {describe(value)} as '{key}', expected text; {hint}")
        return data


def host_path(volume: Mapping[str, Any]) -> Path | None:
    """Return the directory of a hostPath volume, the one kind that exists outside a cluster too."""
    described = volume.get("hostPath")
    path = described.get("path") if isinstance(described, Mapping) else None
    return Path(path) if isinstance(path, str) and path else None
