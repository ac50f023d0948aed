"""From a Workspace manifest, training_config.yaml, the environment and flags to one `TuningJob`.

Later layers win: defaults, preset, manifest, training_config.yaml, environment, flags. Touches neither the
network nor the GPU: a dry run does this and nothing else. Start at `load_job`.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import SecretStr

from runtime import gpus, instance_types
from runtime.errors import ConfigError
from runtime.hardware import has_bfloat16
from runtime.tuning import loggers
from runtime.tuning.arguments import lora, rules, training
from runtime.tuning.data import urls
from runtime.tuning.model import lora_init
from runtime.tuning.settings import TuningJob
from runtime.workspace import (
    config_file,
    config_maps,
    flags,
    mixups,
    names,
    outside,
    references,
    runs,
    sections,
)
from runtime.workspace.apply import apply_training_config
from runtime.workspace.base_model import (
    map_targets,
    put_model,
    put_mounted_weights,
    require_model,
    warn_if_gated,
)
from runtime.workspace.config_file import ConfigFile
from runtime.workspace.layers import LayeredSettings, Resolved, find_placeholders
from runtime.workspace.manifest import WorkspaceDocuments, is_manifest, read
from runtime.workspace.mounts import Mounts
from runtime.workspace.schema import TuningSpec, host_path

METRICS_HOST_VARIABLE = "RUNTIME_METRICS_HOST"
"""Where a job's metrics listen; the image sets it, so that a published port reaches them."""


def load_job(
    target: WorkspaceDocuments | Path | str | None,
    *,
    environ: Mapping[str, str],
    config: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    root: Path = Path("/"),
) -> Resolved[TuningJob]:
    """Return the tuning job that `target` describes, resolved.

    Args:
        target: A manifest, read or its file; or a preset, repository id or model directory; or None in a
            controller's pod, where the mounts describe the job.
        environ: The process environment.
        config: A training_config.yaml, or a ConfigMap with one; it wins over every other place.
        overrides: Flags. `--output` and `--data` hold lists of values; other keys are dotted settings of
            TuningJob ("lora.r") or of training_config.yaml ("LoraConfig.r").
        root: Where the controller's mounts lie; another directory than "/" only in tests.
    """
    settings, mounts = LayeredSettings(), Mounts(root, environ)
    overrides = names.resolve(overrides)
    settings.put_all("training", training.DEFAULTS, "default")
    manifest = _apply_target(settings, target, mounts, data=overrides.get("--data", ()))
    file = config_file.find(config, manifest, mounts, overrides)
    _apply_config(settings, file, mounts)
    if config is None and not environ.get("YAML_FILE_PATH"):
        settings.warn_all(config_maps.unnamed(manifest, sections.KEY))
    put_mounted_weights(settings, mounts)
    _apply_environment(settings, mounts)
    require_model(settings)
    where = str(manifest.file if manifest else target or file.where)
    _name(settings, overrides.get("--data", ()))
    flags.apply(settings, overrides, where)
    _finish(settings, mounts, manifest)
    job = settings.build(TuningJob, "--set" if flags.dotted(overrides) else where)
    sources = settings.origins(job)
    _check(job, sources, settings)
    job = job.model_copy(update={"sources": sources})
    return Resolved(job, sources, tuple(settings.warnings), _placeholders(settings, manifest))


def _check(job: TuningJob, sources: Mapping[str, str], settings: LayeredSettings) -> None:
    """Raise ConfigError for settings that do not go together; warn of those without effect."""
    lora.check(job.lora)
    if said := lora.unserved(job.lora):
        settings.warn(said)
    lora_init.check(job.lora, bits=job.quantization.bits if job.quantization else None)
    rules.check(job, sources)
    settings.warn_all(rules.notes(job, sources))
    loggers.check(job.training)
    references.check_job(job, sources)
    settings.warn_all(references.notes(job, sources))


def _apply_target(
    settings: LayeredSettings,
    target: WorkspaceDocuments | Path | str | None,
    mounts: Mounts,
    *,
    data: Sequence[str],
) -> WorkspaceDocuments | None:
    """Lay the manifest or the model that the command line names under the rest; return the manifest.

    `data` are the words of `--data`, among which the model may be.
    """
    if not isinstance(target, WorkspaceDocuments):
        mixups.check(None if target is None else str(target), data)
    if target is None:
        if mounts.controlled:
            settings.put("output.overwrite", True, "controller default")
        return None
    if not isinstance(target, WorkspaceDocuments) and not is_manifest(target):
        _choose_model(settings, str(target), "command line")
        return None
    manifest = target if isinstance(target, WorkspaceDocuments) else read(Path(target), "tuning")
    settings.warn_all(manifest.warnings)
    _apply_manifest(settings, manifest, mounts)
    return manifest


def _apply_manifest(settings: LayeredSettings, manifest: WorkspaceDocuments, mounts: Mounts) -> None:
    workspace, file = manifest.workspace, manifest.file
    tuning = workspace.tuning
    if tuning is None:
        raise ConfigError(f"{file}: this Workspace has 'inference', not 'tuning'; use `runtime serve {file}`")
    settings.put("name", workspace.metadata.name, f"{file.name} metadata.name")
    _choose_model(settings, tuning.preset.name, f"{file.name} tuning.preset.name")
    if tuning.method:
        settings.put("method", tuning.method, f"{file.name} tuning.method")
    if tuning.input.urls:
        settings.put("data.urls", tuple(tuning.input.urls), f"{file.name} tuning.input.urls")
    if tuning.input.image:
        settings.put("data.image", tuning.input.image, f"{file.name} tuning.input.image")
    if tuning.output.image:
        settings.put("output.image", tuning.output.image, f"{file.name} tuning.output.image")
    _apply_volumes(settings, tuning, file, mounts)
    if workspace.resource.count > 1:
        settings.warn(
            f"{file.name} resource.count is {workspace.resource.count}: "
            "a controller refuses to tune on several nodes"
        )


def _apply_volumes(settings: LayeredSettings, tuning: TuningSpec, file: Path, mounts: Mounts) -> None:
    """Outside a cluster, use a hostPath directly; in one, the controller mounts every volume."""
    if mounts.controlled:
        return
    for name, volume in (("input", tuning.input.volume), ("output", tuning.output.volume)):
        if volume is None:
            continue
        where, folder = f"{file.name} tuning.{name}.volumeSource", host_path(volume)
        setting = "data.folder" if name == "input" else "output.folder"
        if folder is not None:
            settings.put(setting, folder, where)
        elif name == "input" and not mounts.data.is_dir():
            settings.warn(f"{where} is no hostPath and nothing is mounted at /mnt/data; give --data here")
        elif name == "output" and not mounts.at("/mnt/results").is_dir():
            settings.warn(f"{where} is no hostPath: the result is left on this machine; --output names where")


def _choose_model(settings: LayeredSettings, name: str, where: str) -> None:
    preset = put_model(settings, name, where)
    if preset is None:
        return
    if not preset.tunable:
        raise ConfigError(f"{where}: preset {preset.name} can be served but not tuned: {preset.untunable}")
    settings.put("training.learning_rate", preset.learning_rate, f"preset {preset.name}")


def _apply_config(settings: LayeredSettings, file: ConfigFile, mounts: Mounts) -> None:
    """Lay training_config.yaml over the job; its quantisation decides the method where none is named."""
    for section, keys in file.raw.items():
        names.check_section(section, keys if isinstance(keys, dict) else (), file.where)
    switches = [key for key in _SWITCHES if key in file.from_flags]
    decides = file.exists or bool(switches)
    config = sections.check(file.raw, file.where, settings.get("method") if decides else None)
    four, eight = config.quantization.load_in_4bit, config.quantization.load_in_8bit
    if settings.get("method") is None and decides:
        method = "qlora" if four or eight else "lora"
        settings.put("method", method, file.label(switches[-1] if switches else "QuantizationConfig"))
    apply_training_config(settings, config, file, mounts)


_SWITCHES = ("QuantizationConfig.load_in_4bit", "QuantizationConfig.load_in_8bit")
"""Keys that decide the method: on the command line as in a file, false turns quantisation off."""


def _apply_environment(settings: LayeredSettings, mounts: Mounts) -> None:
    """Apply the variables of the controller, of its init containers and of the image."""
    environ = mounts.environ
    if environ.get(METRICS_HOST_VARIABLE):
        settings.put("metrics_host", environ[METRICS_HOST_VARIABLE], f"environment {METRICS_HOST_VARIABLE}")
    elif mounts.controlled:
        settings.put("metrics_host", "0.0.0.0", "pod")  # noqa: S104 - it is probed from outside
    if environ.get("DATA_URLS", "").split():
        settings.put("data.urls", tuple(environ["DATA_URLS"].split()), "environment DATA_URLS")
        settings.put("data.image", None, "environment DATA_URLS")
    if environ.get("DATASET_FOLDER_PATH"):
        folder = Path(environ["DATASET_FOLDER_PATH"])
        settings.put("data.folder", folder, "environment DATASET_FOLDER_PATH")
    targets = [name.strip() for name in environ.get("DEFAULT_TARGET_MODULES", "").split(",") if name.strip()]
    if targets and settings.get("lora.targets") is None:
        settings.put("lora.targets", targets, "environment DEFAULT_TARGET_MODULES")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environ.get(variable):
            settings.put("hub_token", SecretStr(environ[variable]), f"environment {variable}")
            break


def _name(settings: LayeredSettings, data: Sequence[str]) -> None:
    """Name a job that no manifest names: after its data, or after its model where the data is mounted."""
    if settings.get("name") is not None:
        return
    called = runs.data_name(data[0]) if data else ""
    if called:
        settings.put("name", runs.slug(called), "flag --data")
    else:
        settings.put("name", runs.slug(Path(str(settings.get("model.name"))).name), "model")


def _finish(settings: LayeredSettings, mounts: Mounts, manifest: WorkspaceDocuments | None) -> None:
    """Derive what depends on all layers: folders, credentials; warn of what will not work."""
    if settings.get("method") == "lora":
        if settings.sources.get("quantization.bits", "").startswith("flag"):
            raise ConfigError(
                f"{settings.sources['quantization.bits']} does not go with method lora "
                f"({settings.sources['method']}), which trains on unquantised weights; use method qlora"
            )
        settings.put("quantization", None, settings.sources["method"])
    elif "quantization" in settings.values and settings.get("quantization") is None:
        raise ConfigError(
            "'quantization' is not set, but method qlora trains on quantised weights; use method lora"
        )
    map_targets(settings)
    warn_if_gated(settings, mounts)
    outside.warn(settings, manifest, mounts)
    _finish_output(settings, mounts)
    _finish_data(settings, mounts, manifest)
    if settings.get("output.image") and not settings.get("output.credentials"):
        credentials = mounts.credentials()
        if credentials:
            settings.put("output.credentials", *credentials)
    if manifest is not None:
        _warn_of_gpu(settings, manifest)


def _finish_output(settings: LayeredSettings, mounts: Mounts) -> None:
    """Decide the output directory.

    In the controller's layout its own rule applies: the default is /mnt/output, and a path outside /mnt is
    taken below it, so that the sidecar that waits for the result finds it. Elsewhere a path is used as it
    is; the default is /mnt/results where the container has it, else results/NAME in the working directory.
    """
    written, source = settings.get("output.folder"), settings.sources.get("output.folder", "default")
    if source.startswith("flag") or (written and not mounts.controlled):
        return
    if not mounts.controlled:
        mounted = mounts.at("/mnt/results")
        folder = mounted if mounted.is_dir() else runs.FOLDER / runs.slug(settings.get("name"))
        settings.put("output.folder", folder, "default")
        return
    text = str(written or "/mnt/output")
    below = os.path.normpath(text if text.startswith("/mnt") else f"/mnt/{text}")
    if not below.startswith("/mnt/"):
        raise ConfigError(f"{source} is {text!r}, expected a directory below /mnt")
    rule = source if below == text else f"{source} (below /mnt, as the controller mounts it)"
    settings.put("output.folder", mounts.at(below), rule if written else "controller default")


def _finish_data(settings: LayeredSettings, mounts: Mounts, manifest: WorkspaceDocuments | None) -> None:
    """Decide the directory that holds the data, or into which it is fetched, and where its rows are kept."""
    if "data.cache" not in settings.sources:
        settings.put("data.cache", mounts.cache() / "encoded-rows", "default")
    if settings.get("data.folder") is not None or settings.get("data.file") is not None:
        return
    remote = " ".join(map(urls.unsigned, settings.get("data.urls") or ())) or settings.get("data.image")
    if remote and not mounts.controlled:
        # Named after the addresses, so that files from different addresses never mix; without their
        # signatures, so that a renewed one finds what is there.
        folder = mounts.cache() / "data" / hashlib.sha256(remote.encode()).hexdigest()[:16]
        settings.put("data.folder", folder, "default")
        return
    settings.put("data.folder", mounts.data, "default")
    if not remote and not mounts.data.is_dir() and manifest is None:
        raise ConfigError("no training data: give --data FILE, DIRECTORY, URL or IMAGE")


def _warn_of_gpu(settings: LayeredSettings, manifest: WorkspaceDocuments) -> None:
    size = manifest.workspace.resource.instance_type
    found = instance_types.find(size)
    without_bfloat16 = found and found.gpu and not has_bfloat16(gpus.of_kind(found.gpu))
    preferred = [source for source in settings.sources.values() if "(bfloat16: where" in source]
    if without_bfloat16 and (preferred or settings.get("training.bf16")):
        settings.warn(
            f"{manifest.file.name} resource.instanceType {size} has GPUs without bfloat16: "
            "float16 is used there"
        )


def _placeholders(settings: LayeredSettings, manifest: WorkspaceDocuments | None) -> tuple[str, ...]:
    """Return a phrase for every value that still holds an example's placeholder."""
    phrases = []
    values = [("output.image", settings.get("output.image")), ("data.image", settings.get("data.image"))]
    values += [("data.urls", url) for url in settings.get("data.urls") or ()]
    for name, value in values:
        placeholder = find_placeholders(value or "")
        if placeholder:
            phrases.append(f"{settings.sources[name]} still holds the placeholder {placeholder}")
    tuning = manifest.workspace.tuning if manifest else None
    if manifest and tuning and settings.get("output.image") == tuning.output.image:
        placeholder = find_placeholders(tuning.output.image_push_secret)
        if placeholder:
            where = f"{manifest.file.name} tuning.output.imagePushSecret"
            phrases.append(f"{where} still holds the placeholder {placeholder}")
    return tuple(phrases)
