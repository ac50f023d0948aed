"""From a Workspace manifest, training_config.yaml, the environment and flags to one `TuningJob`.

Later layers win: defaults, preset, manifest, training_config.yaml, environment, flags. Does not touch the
network or the GPU: a dry run is this and nothing more. Start at `load_job`.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import SecretStr

from runtime.errors import ConfigError
from runtime.tuning import training_arguments
from runtime.tuning.model import lora_init
from runtime.tuning.settings import TuningJob
from runtime.workspace import config_file, flags, sections
from runtime.workspace.apply import apply
from runtime.workspace.base_model import map_targets, put_model, put_mounted_weights, warn_if_gated
from runtime.workspace.config_file import ConfigFile, WorkspaceDocuments
from runtime.workspace.manifest import TuningSpec, host_path, read
from runtime.workspace.mounts import Mounts
from runtime.workspace.settings import Resolved, Settings, placeholder

WITHOUT_BFLOAT16 = re.compile(
    r"standard_(?P<gpu>nc\d+r?s_v3|nc\d+as_t4_v3|nc\d+s_v2|nd\d+r?s)$", re.IGNORECASE
)
"""Azure sizes with V100, T4, P100 or P40 GPUs."""


def load_job(
    target: Path | str | None,
    *,
    environ: Mapping[str, str],
    config: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    root: Path = Path("/"),
) -> Resolved[TuningJob]:
    """Return the tuning job that `target` asks for, resolved.

    Args:
        target: A manifest; or a preset, repository id or model directory; or None in a controller's pod,
            where the mounts say everything.
        environ: The process environment.
        config: A training_config.yaml, or a ConfigMap with one; before every other place.
        overrides: Flags. `--output` and `--data` hold lists of words; other keys are dotted settings of
            TuningJob ("lora.r") or of training_config.yaml ("LoraConfig.r").
        root: Where the controller's mounts lie; another directory than "/" only in tests.
    """
    settings, mounts, manifest = Settings(), Mounts(root, environ), None
    settings.put_all("training", training_arguments.DEFAULTS, "default")
    if target is not None and is_manifest(target):
        manifest = WorkspaceDocuments(Path(target), *read(Path(target)))
        _apply_manifest(settings, manifest, mounts)
    elif target is not None:
        settings.put("name", _slug(str(target)), "command line")
        _choose_model(settings, str(target), "command line")
    found = config_file.find(config, manifest, mounts, overrides)
    _apply_config(settings, found, mounts)
    put_mounted_weights(settings, mounts)
    _apply_environment(settings, environ)
    if settings.get("model.name") is None:
        raise ConfigError("no model: give a manifest, a preset, a repository id or a model directory")
    where = str(target or found.where)
    flags.apply(settings, overrides, where)
    _finish(settings, mounts, manifest)
    job = settings.build(TuningJob, "--set" if flags.dotted(overrides) else where)
    lora_init.check(job.lora, bits=job.quantization.bits if job.quantization else None)
    sources = settings.origins(job)
    job = job.model_copy(update={"sources": sources})
    return Resolved(job, sources, tuple(settings.warnings), _placeholders(settings, manifest))


def is_manifest(target: Path | str) -> bool:
    """Whether the command line names a file, rather than a model."""
    return Path(target).is_file() or Path(target).suffix in (".yaml", ".yml", ".json")


def _apply_manifest(settings: Settings, manifest: WorkspaceDocuments, mounts: Mounts) -> None:
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


def _apply_volumes(settings: Settings, tuning: TuningSpec, file: Path, mounts: Mounts) -> None:
    """Use a hostPath directly outside a cluster; what is not one, a controller mounts."""
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


def _choose_model(settings: Settings, name: str, where: str) -> None:
    preset = put_model(settings, name, where)
    if preset is None:
        return
    if not preset.tunable:
        raise ConfigError(
            f"{where}: preset {preset.name} can be served but not tuned (see `runtime presets`)"
        )
    settings.put("training.learning_rate", preset.learning_rate, f"preset {preset.name}")


def _apply_config(settings: Settings, found: ConfigFile, mounts: Mounts) -> None:
    """Lay training_config.yaml over the job, and settle the method by it where nobody named one."""
    config = sections.check(found.raw, found.where, settings.get("method") if found.given else None)
    four, eight = config.quantization.load_in_4bit, config.quantization.load_in_8bit
    if settings.get("method") is None and found.given:
        method = "qlora" if four or eight else "lora"
        settings.put("method", method, found.label("QuantizationConfig"))
    apply(settings, config, found, mounts)


def _apply_environment(settings: Settings, environ: Mapping[str, str]) -> None:
    """Honour the variables of the controller and of its init containers."""
    if environ.get("DATA_URLS", "").split():
        settings.put("data.urls", tuple(environ["DATA_URLS"].split()), "environment DATA_URLS")
        settings.put("data.image", None, "environment DATA_URLS")
    if environ.get("DATASET_FOLDER_PATH"):
        folder = Path(environ["DATASET_FOLDER_PATH"])
        settings.put("data.folder", folder, "environment DATASET_FOLDER_PATH")
    names = [name.strip() for name in environ.get("DEFAULT_TARGET_MODULES", "").split(",") if name.strip()]
    if names and settings.get("lora.targets") is None:
        settings.put("lora.targets", names, "environment DEFAULT_TARGET_MODULES")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environ.get(variable):
            settings.put("hub_token", SecretStr(environ[variable]), f"environment {variable}")
            break


def _finish(settings: Settings, mounts: Mounts, manifest: WorkspaceDocuments | None) -> None:
    """Set what follows from everything else: names, folders, credentials; warn of what will not work."""
    if settings.get("name") is None:
        settings.put("name", _slug(Path(str(settings.get("model.name"))).name), "model")
    if settings.get("method") == "lora":
        settings.put("quantization", None, settings.sources["method"])
    elif "quantization" in settings.values and settings.get("quantization") is None:
        raise ConfigError(
            "'quantization' is nothing, but method qlora trains on quantised weights; use method lora"
        )
    map_targets(settings)
    warn_if_gated(settings, mounts)
    _finish_output(settings, mounts)
    _finish_data(settings, mounts, manifest)
    if settings.get("output.image") and not settings.get("output.credentials"):
        found = mounts.credentials()
        if found:
            settings.put("output.credentials", *found)
    if manifest is not None:
        _warn_of_gpu(settings, manifest)


def _finish_output(settings: Settings, mounts: Mounts) -> None:
    """Settle the output directory.

    In the controller's layout its own rule holds: nothing is /mnt/output, what is not below /mnt goes
    there, so that the sidecar that waits for the result finds it. Elsewhere a path is what it says, and
    the default is /mnt/results where the container has it, else results/NAME in the working directory.
    """
    written, source = settings.get("output.folder"), settings.sources.get("output.folder", "default")
    if source.startswith("flag") or (written and not mounts.controlled):
        return
    if not mounts.controlled:
        mounted = mounts.at("/mnt/results")
        folder = mounted if mounted.is_dir() else Path("results") / _slug(settings.get("name"))
        settings.put("output.folder", folder, "default")
        return
    text = str(written or "/mnt/output")
    below = os.path.normpath(text if text.startswith("/mnt") else f"/mnt/{text}")
    if not below.startswith("/mnt/"):
        raise ConfigError(f"{source} is {text!r}, expected a directory below /mnt")
    rule = source if below == text else f"{source} (below /mnt, as the controller mounts it)"
    settings.put("output.folder", mounts.at(below), rule if written else "controller default")


def _finish_data(settings: Settings, mounts: Mounts, manifest: WorkspaceDocuments | None) -> None:
    """Settle the directory that data lies in, or is fetched into."""
    if settings.get("data.folder") is not None or settings.get("data.file") is not None:
        return
    remote = " ".join(settings.get("data.urls") or ()) or settings.get("data.image")
    if remote and not mounts.controlled:
        # Named after the addresses: files of other addresses never mix with these.
        folder = mounts.cache() / "data" / hashlib.sha256(remote.encode()).hexdigest()[:16]
        settings.put("data.folder", folder, "default")
        return
    settings.put("data.folder", mounts.data, "default")
    if not remote and not mounts.data.is_dir() and manifest is None:
        raise ConfigError("no training data: give --data FILE, DIRECTORY or URL")


def _warn_of_gpu(settings: Settings, manifest: WorkspaceDocuments) -> None:
    size = manifest.workspace.resource.instance_type
    found = WITHOUT_BFLOAT16.match(size)
    preferred = [source for source in settings.sources.values() if "(bfloat16: where" in source]
    if found and (preferred or settings.get("training.bf16")):
        settings.warn(
            f"{manifest.file.name} resource.instanceType {size} has GPUs without bfloat16: "
            "float16 is used there"
        )


def _placeholders(settings: Settings, manifest: WorkspaceDocuments | None) -> tuple[str, ...]:
    """Return a phrase for every value that is still the example's."""
    found = []
    values = [("output.image", settings.get("output.image")), ("data.image", settings.get("data.image"))]
    values += [("data.urls", url) for url in settings.get("data.urls") or ()]
    for name, value in values:
        word = placeholder(value or "")
        if word:
            found.append(f"{settings.sources[name]} still holds the placeholder {word}")
    tuning = manifest.workspace.tuning if manifest else None
    if manifest and tuning and settings.get("output.image") == tuning.output.image:
        word = placeholder(tuning.output.image_push_secret)
        if word:
            where = f"{manifest.file.name} tuning.output.imagePushSecret"
            found.append(f"{where} still holds the placeholder {word}")
    return tuple(found)


def _slug(name: str) -> str:
    """Return `name` fit for one part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip(".-") or "job"
