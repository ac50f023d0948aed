"""What a manifest asks of a cluster, said where there is none: claims, Secrets, replicas, the preset's image.

In a pod the cluster has seen to them. Start at `warn`.
"""

from collections.abc import Iterator

from runtime.workspace.layers import LayeredSettings
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.mounts import Mounts
from runtime.workspace.schema import LOAD_BALANCER, PresetOptions


def warn(settings: LayeredSettings, manifest: WorkspaceDocuments | None, mounts: Mounts) -> None:
    """Warn of what `manifest` asks for and only a cluster has, unless this is a pod."""
    if manifest is None or mounts.controlled:
        return
    preset = manifest.workspace.preset
    if preset is not None:
        where = f"{manifest.file.name} {manifest.work}.preset"
        for missing in _preset(preset.options, mounts):
            settings.warn(f"{where}.presetOptions.{missing}")
        if preset.access_mode == "private" and not preset.options.image:
            settings.warn(f"{where}.accessMode is private, which has no effect without presetOptions.image")
    names = tuple(dict.fromkeys(_registry_secrets(manifest)))
    if names and mounts.credentials() is None:
        settings.warn(
            f"{manifest.file.name} names {_secrets(names)}, which only a cluster has: registries are asked "
            "without credentials; log in with `docker login`"
        )
    if manifest.work == "inference" and manifest.workspace.metadata.asks(LOAD_BALANCER):
        settings.warn(f"{manifest.file.name} metadata.annotations {LOAD_BALANCER}: only a cluster has it")
    nodes = manifest.workspace.resource.count * manifest.replicas
    if manifest.work == "inference" and nodes > 1:
        settings.warn(f"{manifest.file.name} asks for {nodes} nodes; here one server runs, on this machine")


def _preset(options: PresetOptions, mounts: Mounts) -> Iterator[str]:
    otherwise = "the weights come from the hub or its cache; --set model.path=DIR reads a directory"
    if options.image:
        yield f"image is {options.image!r}, which only a controller runs: {otherwise}"
    if options.model_weights_pvc and mounts.weights() is None:
        yield f"modelWeightsPVC is {options.model_weights_pvc!r}, a claim not mounted here: {otherwise}"
    if options.model_access_secret and not mounts.environ.get("HF_TOKEN"):
        yield f"modelAccessSecret is {options.model_access_secret!r}, which only a cluster has; set HF_TOKEN"


def _registry_secrets(manifest: WorkspaceDocuments) -> Iterator[str]:
    tuning, inference = manifest.workspace.tuning, manifest.workspace.inference
    if tuning is not None:
        yield from filter(None, [tuning.output.image_push_secret, *tuning.input.image_pull_secrets])
    for adapter in inference.adapters if inference else ():
        yield from adapter.source.image_pull_secrets


def _secrets(names: tuple[str, ...]) -> str:
    return f"Secret{'s' if len(names) > 1 else ''} {', '.join(names)}"
