"""What of a Workspace Kubernetes would refuse, and what of it has no effect without the controller.

Reads one Workspace and the documents beside it. Start at `refuse`; `ineffective` returns warnings.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime import oci
from runtime.config import yaml_documents
from runtime.errors import ConfigError
from runtime.workspace.kubernetes import names, nodes, pod, secrets
from runtime.workspace.kubernetes.options import PodOptions
from runtime.workspace.layers import find_placeholders
from runtime.workspace.manifest import Document, WorkspaceDocuments
from runtime.workspace.schema import (
    BYPASS,
    KUBECTL,
    LOAD_BALANCER,
    RUNTIME,
    PresetSpec,
    Source,
    TuningSpec,
    Workspace,
)

REGISTRY_KEY = ".dockerconfigjson"
_WITH_EFFECT = {
    LOAD_BALANCER,
    BYPASS,
    RUNTIME,  # load_server says what serves instead
    "kaito.sh/disable-benchmark",  # there is none
}


def refuse(manifest: WorkspaceDocuments, others: Sequence[Document], options: PodOptions) -> None:
    """Raise ConfigError for the first name, label, quantity or Secret that a cluster would not take."""
    workspace, where = manifest.workspace, str(manifest.file)
    _metadata(manifest)
    _resource(workspace, where)
    if workspace.preset is not None:
        _preset(workspace.preset, f"{where}: {manifest.work}.preset.presetOptions")
    if workspace.tuning is not None:
        _tuning(workspace.tuning, f"{where}: tuning")
    for adapter in workspace.inference.adapters if workspace.inference else ():
        _source(adapter.source, f"{where}: inference.adapters {adapter.source.name}")
    _options(options)
    for secret, key, field in _secrets(manifest):
        names.subdomain(secret, f"{where}: {field}")
        _secret_beside(manifest, others, (secret, key))


def _metadata(manifest: WorkspaceDocuments) -> None:
    metadata, where = manifest.workspace.metadata, f"{manifest.file}: metadata"
    several = manifest.workspace.resource.count > 1
    if manifest.work == "inference" or several:
        room = len(str(manifest.workspace.resource.count)) + 1 if manifest.work == "tuning" else 0
        names.service(metadata.name, f"{where}.name (that of the Service too)", room=room)
    else:
        longest = names.LONGEST_LABEL  # the name is a label of the Job's pods
        names.subdomain(metadata.name, f"{where}.name (a label of the pods too)", longest=longest)
    if metadata.namespace:
        names.label(metadata.namespace, f"{where}.namespace")
    names.labels(metadata.labels, f"{where}.labels")
    for place in secrets.places(metadata.labels, f"{where}.labels"):
        raise ConfigError(f"{place} holds a secret, which everybody who lists objects reads; leave it out")
    names.annotations(metadata.annotations, f"{where}.annotations")


def _resource(workspace: Workspace, where: str) -> None:
    resource = workspace.resource
    names.label_value(resource.instance_type, f"{where}: resource.instanceType")
    if resource.label_selector is not None:
        field = f"{where}: resource.labelSelector"
        names.labels(resource.label_selector.match_labels, f"{field}.matchLabels")
        for expression in resource.label_selector.match_expressions:
            names.label_key(expression.key, f"{field}.matchExpressions key")
            for value in expression.values:
                names.label_value(value, f"{field}.matchExpressions {expression.key}")
    for node in resource.preferred_nodes:
        names.subdomain(node, f"{where}: resource.preferredNodes")


def _preset(preset: PresetSpec, field: str) -> None:
    _in_a_registry(preset.options.image, f"{field}.image")
    if preset.options.model_weights_pvc:
        names.subdomain(preset.options.model_weights_pvc, f"{field}.modelWeightsPVC")
    names.sub_path(preset.options.model_weights_sub_path, f"{field}.modelWeightsSubPath")


def _tuning(spec: TuningSpec, field: str) -> None:
    _source(spec.input, f"{field}.input")
    if spec.output.volume is not None:
        _volume(spec.output.volume, f"{field}.output.volumeSource")
        _writable(spec.output.volume, f"{field}.output.volumeSource")
    _in_a_registry(spec.output.image, f"{field}.output.image")


def _source(source: Source, field: str) -> None:
    if source.volume is not None:
        _volume(source.volume, f"{field}.volumeSource")
    _in_a_registry(source.image, f"{field}.image")


def _volume(source: Mapping[str, Any], field: str) -> None:
    names.volume(source, field)
    for place in secrets.places(source, field):
        raise ConfigError(
            f"{place} holds a secret, which everybody who lists pods reads; write it into a Secret that the "
            "volume names (secretRef, nodePublishSecretRef, secretName)"
        )


def _writable(source: Mapping[str, Any], field: str) -> None:
    kind, described = next((kind, described) for kind, described in source.items() if described is not None)
    if kind in names.READ_ONLY_VOLUMES or described.get("readOnly"):
        raise ConfigError(f"{field}.{kind} cannot be written to; the result needs a volume that can")


def _in_a_registry(image: str, field: str) -> None:
    if not image or find_placeholders(image):
        return
    try:
        layout = oci.parse(image).layout
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None
    if layout is not None:
        raise ConfigError(f"{field} is {image!r}, a layout on a disk that pods do not have; name an image")


def _options(options: PodOptions) -> None:
    _in_a_registry(options.image, "--image")
    for flag, amount in (("--cpu", options.cpu), ("--memory", options.memory)):
        if amount is not None:
            names.quantity(amount, flag)
    if options.cache_claim is not None:
        names.subdomain(options.cache_claim, "--cache-claim")
    for flag, secret in (
        ("--api-key-secret", options.api_key),
        ("--api-key-file-secret", options.api_key_file),
    ):
        if secret is not None:
            names.subdomain(secret[0], flag)
            names.secret_key(secret[1], flag)


def _secrets(manifest: WorkspaceDocuments) -> Iterator[tuple[str, str, str]]:
    """Yield name, key and field of each Secret that the Workspace names."""
    tuning, inference, preset = (
        manifest.workspace.tuning,
        manifest.workspace.inference,
        manifest.workspace.preset,
    )
    if preset is not None:
        field = f"{manifest.work}.preset.presetOptions"
        if preset.options.model_access_secret:
            yield preset.options.model_access_secret, "HF_TOKEN", f"{field}.modelAccessSecret"
        for name in preset.options.image_pull_secrets:
            yield name, REGISTRY_KEY, f"{field}.imagePullSecrets"
    if tuning is not None:
        if tuning.output.image_push_secret:
            yield tuning.output.image_push_secret, REGISTRY_KEY, "tuning.output.imagePushSecret"
        for name in tuning.input.image_pull_secrets:
            yield name, REGISTRY_KEY, "tuning.input.imagePullSecrets"
    for adapter in inference.adapters if inference else ():
        for name in adapter.source.image_pull_secrets:
            yield name, REGISTRY_KEY, f"inference.adapters {adapter.source.name} imagePullSecrets"


def _secret_beside(manifest: WorkspaceDocuments, others: Sequence[Document], wanted: tuple[str, str]) -> None:
    """Check a Secret that is in the file: in the Workspace's namespace, with the key that the pod reads."""
    name, key = wanted
    for document in others:
        metadata = document.get("metadata")
        if document["kind"] != "Secret" or not isinstance(metadata, dict) or metadata.get("name") != name:
            continue
        own, its = manifest.workspace.metadata.namespace, metadata.get("namespace")
        if its and its != (own or its):
            raise ConfigError(
                f"{manifest.file}: Secret {name} is in namespace {its!r}, the Workspace in {own!r}, "
                "expected the same"
            )
        held = {**_values(document, "data"), **_values(document, "stringData")}
        if key not in held:
            raise ConfigError(
                f"{manifest.file}: Secret {name} has no key '{key}', which the pod reads; it has "
                f"{', '.join(map(repr, held)) or 'none'}"
            )


def _values(document: Document, field: str) -> Mapping[str, Any]:
    values = document.get(field)
    return values if isinstance(values, dict) else {}


def ineffective(
    manifest: WorkspaceDocuments, options: PodOptions, *, gpus: bool, keyed: bool
) -> Iterator[str]:
    """Yield what the Workspace asks for and the objects do not carry out; `keyed`: clients need a key."""
    workspace, name = manifest.workspace, manifest.file.name
    preset = workspace.preset
    if preset is not None and preset.options.image and preset.options.image != options.image:
        field = f"{name} {manifest.work}.preset.presetOptions.image"
        yield (
            f"{field} is {preset.options.image!r}, which is not used: {options.image} runs, and the weights "
            "come from the hub or from modelWeightsPVC"
        )
    if preset is not None and preset.access_mode == "private" and not preset.options.image:
        yield f"{name} {manifest.work}.preset.accessMode is private, which has no effect without an image"
    for annotation, value in workspace.metadata.annotations.items():
        if annotation.startswith(KUBECTL) or annotation in _WITH_EFFECT:
            continue
        if any(secrets.places({annotation: value})):
            yield f"{name} metadata.annotations {annotation} holds a secret, so it is left out of the objects"
        elif pod.is_of_a_controller(annotation):
            yield f"{name} metadata.annotations {annotation} has no effect without the controller"
    yield from nodes.warnings(workspace.resource, name, gpus=gpus)
    asked = f"{name} metadata.annotations {LOAD_BALANCER}"
    if workspace.metadata.asks(LOAD_BALANCER) and manifest.work == "tuning":
        yield f"{asked} has no effect on tuning, which serves nobody"
    elif workspace.metadata.asks(LOAD_BALANCER) and not keyed:
        yield f"{asked}: anybody who reaches the address is served; give --api-key-secret"


def exposed(others: Sequence[Document]) -> Iterator[str]:
    """Yield the ConfigMaps of the file that hold a secret: they are passed on as they are."""
    for document in others:
        if document["kind"] == "ConfigMap":
            name = document.get("metadata", {}).get("name")
            for key, value in _values(document, "data").items():
                if any(secrets.places({key: _read(value)})):
                    yield f"ConfigMap {name}: data.{key} holds a secret, which belongs into a Secret"


def _read(value: Any) -> Any:
    """Return the documents of a text that is YAML, else the text."""
    try:
        return yaml_documents(value, "") if isinstance(value, str) and "\n" in value else value
    except ConfigError:
        return value


def wrong_secrets(others: Sequence[Document]) -> Iterator[str]:
    """Yield the Secrets whose data is no base64: examples leave words there."""
    for document in others:
        if document["kind"] == "Secret":
            for key, value in _values(document, "data").items():
                try:
                    base64.b64decode(str(value), validate=True)
                except (binascii.Error, ValueError):
                    name = document.get("metadata", {}).get("name")
                    yield f"Secret {name}: data.{key} is no base64; write the value itself into stringData"
