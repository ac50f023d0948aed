"""Which base model a manifest, a configuration section or a mount names, and its LoRA target modules.

Knows presets and mounted weights. Does not read weights. Start at `put_model`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from runtime import families, model_files, presets
from runtime.config import describe, read_text
from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.presets import Preset
from runtime.workspace import sections
from runtime.workspace.layers import LayeredSettings
from runtime.workspace.mounts import WEIGHTS, Mounts
from runtime.workspace.sections import ModelConfig

Label = Callable[[str], str]
"""Turns "Section.key" into the phrase that tells a user where it is written."""


def put_model(settings: LayeredSettings, name: str, where: str) -> Preset | None:
    """Set the base model to `name` (preset, directory or repository id); return its preset, if it has one."""
    try:
        model = presets.source(name)
    except ConfigError as error:
        raise ConfigError(str(error) if where == "command line" else f"{where}: {error}") from None
    preset = presets.matching(model)
    known = ModelSource(name=name).model_dump()
    origin = f"preset {preset.name}" if preset else where
    settings.drop("model")
    for key, value in model.model_dump().items():
        if value != known[key]:
            settings.put(f"model.{key}", value, origin)
    settings.put("model.name", model.name, where)
    return preset


def require_model(settings: LayeredSettings) -> None:
    """Raise ConfigError when no layer has named a model."""
    if settings.get("model.name") is None:
        raise ConfigError(
            "no model: give a preset (`runtime presets` lists them), a repository id, a model directory or a "
            "manifest, before the flags"
        )


def put_mounted_weights(settings: LayeredSettings, mounts: Mounts) -> None:
    """Use the weights that a controller mounted; a name that the model already has stays."""
    folder = mounts.weights()
    if folder is None or settings.get("model.path") is not None:
        return
    if settings.get("model.name") is None:
        _name_mounted(settings, folder, mounts.preset())
    settings.put("model.path", folder, "mounted weights")


def _name_mounted(settings: LayeredSettings, folder: Path, preset: str | None) -> None:
    """Name the mounted model after its preset, where the image records one; values already set stay."""
    if preset is None:
        settings.put("model.name", str(folder), "mounted weights")
        return
    model = presets.source(preset)
    for key, value in model.model_dump(exclude_defaults=True).items():
        if settings.get(f"model.{key}") is None:
            settings.put(f"model.{key}", value, f"preset {preset} of this image")


def warn_if_gated(settings: LayeredSettings, mounts: Mounts) -> None:
    """Warn when the hub will demand a token and none is set."""
    preset = presets.matching(ModelSource(name=settings.get("model.name")))
    token = mounts.environ.get("HF_TOKEN") or mounts.environ.get("HUGGING_FACE_HUB_TOKEN")
    if preset and preset.gated and settings.get("model.path") is None and not token:
        settings.warn(
            f"{preset.repository} is gated: accept its licence on the hub and set HF_TOKEN, in a cluster by "
            "the Secret that presetOptions.modelAccessSecret names"
        )


def apply_model(settings: LayeredSettings, section: ModelConfig, label: Label, mounts: Mounts) -> None:
    """Lay the ModelConfig section over the model."""
    name = section.pretrained_model_name_or_path
    if name and name.rstrip("/") not in WEIGHTS:
        put_model(settings, name, label("ModelConfig.pretrained_model_name_or_path"))
    elif name and mounts.weights() is None:
        settings.warn(f"no weights are mounted at {name}: the model is read from the hub or its cache")
    if section.revision:
        settings.put("model.revision", section.revision, label("ModelConfig.revision"))
    if section.trust_remote_code:
        settings.put("model.trust_remote_code", True, label("ModelConfig.trust_remote_code"))
    if section.attn_implementation:
        settings.put("model.attention", section.attn_implementation, label("ModelConfig.attn_implementation"))
    if section.chat_template:
        text = chat_template(section.chat_template, label("ModelConfig.chat_template"), mounts)
        settings.put("model.chat_template", text, label("ModelConfig.chat_template"))
    for key in ("torch_dtype", "dtype"):
        put_dtype(settings, "model.dtype", getattr(section, key), label(f"ModelConfig.{key}"))
    _offline(settings, section, label, mounts)
    if section.from_tf:
        raise ConfigError(f"{label('ModelConfig.from_tf')} is true, but only safetensors weights are read")
    for key, silent in sections.MODEL_WITHOUT_EFFECT.items():
        value = getattr(section, key)
        if value is not None and value not in silent:
            settings.warn(f"{label('ModelConfig.' + key)} has no effect here")


def _offline(settings: LayeredSettings, section: ModelConfig, label: Label, mounts: Mounts) -> None:
    """Apply `local_files_only`, except where no weights are mounted: stock templates always set it."""
    if not section.local_files_only:
        return
    where = label("ModelConfig.local_files_only")
    if mounts.weights() is None and settings.get("model.path") is None:
        settings.warn(
            f"{where} is for weights that a controller mounts; none are mounted, so the model may be "
            "downloaded (HF_HUB_OFFLINE=1 forbids it)"
        )
        return
    settings.put("model.local_files_only", True, where)


def put_dtype(settings: LayeredSettings, name: str, written: str | None, where: str) -> None:
    """Set a compute type."""
    if written is None:
        return
    dtype = read_dtype(written, where)
    preferred = dtype == "auto" and not written.endswith("auto")
    settings.put(name, dtype, f"{where} (bfloat16: where the GPU has it)" if preferred else where)


def read_dtype(written: str, where: str) -> str:
    """Return a compute type as a setting, from torch's or vLLM's name for it.

    Every stock template and preset has bfloat16, even for a V100, so it is taken as a preference: "auto" is
    bfloat16 wherever the GPU has it. Any other type is the user's own choice and is kept.
    """
    dtype = written.removeprefix("torch.")
    dtype = {"half": "float16", "float": "float32", "bfloat16": "auto"}.get(dtype, dtype)
    if dtype not in ("auto", "float16", "float32"):
        raise ConfigError(f"{where} is {describe(written)}, expected auto, bfloat16, float16 or float32")
    return dtype


def chat_template(written: str, where: str, mounts: Mounts) -> str:
    """Return the template's text; `written` is Jinja, a file, or the name of a template in presets/."""
    if "{{" in written or "{%" in written:
        return written
    ours = presets.FOLDER / "chat_templates" / Path(written).name
    for file in (mounts.at(written) if written.startswith("/") else Path(written), ours):
        if file.is_file():
            return read_text(file)
    raise ConfigError(f"{where}: no chat template {written!r}, expected a file or Jinja text")


def map_targets(settings: LayeredSettings) -> None:
    """Replace target names that the architecture has fused or calls differently, with a warning.

    peft matches names by their endings and accepts a list of which only one matches, so split names on a
    fused model would adapt half of it without any message.
    """
    targets = settings.get("lora.targets")
    if isinstance(targets, str) or not targets:
        return
    if [str(name) for name in targets] == ["all-linear"]:
        settings.put("lora.targets", "all-linear", settings.sources["lora.targets"])
        return
    fused = _fused_targets(settings)
    mapped = tuple(dict.fromkeys(fused.get(name, name) for name in targets))
    source = settings.sources.get("lora.targets", "lora")
    if set(mapped) != set(targets):
        changed = [name for name in targets if name in fused]
        settings.warn(
            f"{source} names {_join(changed)}, which this architecture has as "
            f"{_join(dict.fromkeys(fused[name] for name in changed))}: those are adapted"
        )
        source = f"{source} (mapped to this architecture's names)"
    settings.put("lora.targets", mapped, source)


def _fused_targets(settings: LayeredSettings) -> dict[str, str]:
    """Return the renames of the family of the model's preset or local files; {} when neither tells it."""
    preset = presets.matching(ModelSource(name=settings.get("model.name") or ""))
    if preset is not None:
        return families.find(preset.model_type).renames
    folder = settings.get("model.path")
    if folder is None:
        return {}
    kind = model_files.read_config(Path(folder) / "config.json").get("model_type")
    return families.find(str(kind)).renames


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)
