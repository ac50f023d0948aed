"""From an inference Workspace, a preset or a model directory to one `ServeConfig`.

Later layers win: defaults, manifest, inference_config.yaml, mounts, environment, flags. Start at
`load_server`.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtime import presets
from runtime.config import describe, nearest, parse
from runtime.errors import ConfigError
from runtime.serving import fit
from runtime.serving.settings import ADAPTER_SOURCES_VARIABLE, AdapterSource, ServeConfig, check
from runtime.workspace import config_maps, outside, references, vllm_flags
from runtime.workspace.base_model import (
    chat_template,
    put_model,
    put_mounted_weights,
    require_model,
    warn_if_gated,
)
from runtime.workspace.config_maps import ConfigDocument
from runtime.workspace.layers import LayeredSettings, Resolved, find_placeholders
from runtime.workspace.manifest import WorkspaceDocuments, is_manifest, read
from runtime.workspace.mounts import Mounts
from runtime.workspace.schema import RUNTIME, AdapterSpec, host_path

INFERENCE_KEY = "inference_config.yaml"

SERVER_KEYS = frozenset({
    "max_model_len", "max_num_seqs", "gpu_memory_utilization", "allowed_origins", "adapter_source",
    "adapter_cache", "max_adapters",
})  # fmt: skip
"""Keys of the `vllm` section that are settings of this server, whatever its engine; the rest are vLLM's where
it serves."""

log = logging.getLogger(__name__)


def load_server(
    target: WorkspaceDocuments | Path | str | None,
    *,
    environ: Mapping[str, str],
    config: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    root: Path = Path("/"),
) -> Resolved[ServeConfig]:
    """Return the server that `target` describes, resolved.

    Args:
        target: An inference manifest, read or its file; or a preset, repository id or model directory; or
            None where a controller mounted the weights.
        environ: The process environment; a variable named like an adapter is that adapter's strength.
        config: An inference_config.yaml, or a ConfigMap with one; it wins over every other place.
        overrides: Flags. `--adapter` holds a list of NAME=REFERENCE[@STRENGTH], `--vllm` vLLM's flags of a
            controller's command (inference_config.yaml wins over these, as in KAITO's own image); other keys
            are dotted settings of ServeConfig ("limits.rows").
        root: Where the controller's mounts lie; another directory than "/" only in tests.
    """
    settings, mounts = LayeredSettings(), Mounts(root, environ)
    if overrides.get("engine") is not None:  # decides which keys of inference_config.yaml have an effect
        settings.put("engine", overrides["engine"], "flag")
    manifest = _manifest(target)
    adapters: dict[str, AdapterSource] = {}
    if manifest is not None:
        adapters = _apply_manifest(settings, manifest, mounts)
    elif target is not None:
        _choose_model(settings, str(target), "command line")
    _apply_engine_flags(settings, overrides.get("--vllm", {}), mounts)
    _apply_config(settings, _config(settings, config, manifest, mounts), mounts)
    _put_weights(settings, mounts)
    _put_adapters(settings, adapters, overrides.get("--adapter", ()), mounts)
    require_model(settings)
    warn_if_gated(settings, mounts)
    outside.warn(settings, manifest, mounts)
    built = _build(settings, overrides, str(manifest.file if manifest else target or "mounts"))
    sources = settings.origins(built)
    references.check_server(built, sources)
    return Resolved(built, sources, (*settings.warnings, *_beyond(built)), _placeholders(built))


def _put_weights(settings: LayeredSettings, mounts: Mounts) -> None:
    put_mounted_weights(settings, mounts)
    if settings.get("served_name") is None and settings.get("model.name") is not None:
        settings.put("served_name", Path(settings.get("model.name")).name, "mounted weights")


def _manifest(target: WorkspaceDocuments | Path | str | None) -> WorkspaceDocuments | None:
    if target is None or isinstance(target, WorkspaceDocuments):
        return target
    return read(Path(target), "inference") if is_manifest(target) else None


def _config(
    settings: LayeredSettings, named: Path | None, manifest: WorkspaceDocuments | None, mounts: Mounts
) -> ConfigDocument | None:
    if named is not None:
        return config_maps.read(named, INFERENCE_KEY)
    settings.warn_all(config_maps.unnamed(manifest, INFERENCE_KEY))
    return config_maps.find(manifest, INFERENCE_KEY, mounts.inference_config)


def _build(settings: LayeredSettings, overrides: Mapping[str, Any], where: str) -> ServeConfig:
    """Return the settings with the flags that name one laid over them; ConfigError where they contradict."""
    built = settings.build(ServeConfig, where)  # an error in a layer below must not be blamed on the flags
    flags = {name: value for name, value in overrides.items() if not name.startswith("--")}
    for name, value in flags.items():
        _put(settings, name, value)
    if flags:
        built = settings.build(ServeConfig, "--set")
    check(built)
    return built


def adapter_flag(word: str) -> AdapterSource:
    """Return the adapter of `NAME=REFERENCE` or `NAME=REFERENCE@STRENGTH` (a number after the last @)."""
    name, equals, reference = word.partition("=")
    if reference.startswith("~"):
        reference = str(Path(reference).expanduser())
    before, at, strength = reference.rpartition("@")
    if not equals or not name or not reference:
        raise ConfigError(f"--adapter {word}: expected NAME=DIRECTORY or NAME=IMAGE")
    if at and before and strength.replace(".", "", 1).isdigit():
        return _adapter(name, before, _strength(strength, f"--adapter {name}"), "--adapter")
    return _adapter(name, reference, 1.0, "--adapter")


def _apply_manifest(
    settings: LayeredSettings, manifest: WorkspaceDocuments, mounts: Mounts
) -> dict[str, AdapterSource]:
    file, inference = manifest.file, manifest.workspace.inference
    if inference is None:
        raise ConfigError(f"{file}: this Workspace has 'tuning', not 'inference'; use `runtime tune {file}`")
    settings.warn_all(manifest.warnings)
    if inference.preset is None:
        raise ConfigError(
            f"{file}: 'inference.preset' is missing: it holds the 'name' of a model; a pod template runs the "
            "image that it names"
        )
    _choose_model(settings, inference.preset.name, f"{file.name} inference.preset.name")
    asks_vllm = manifest.workspace.metadata.annotations.get(RUNTIME, "").lower() == "vllm"
    if asks_vllm and settings.get("engine") != "vllm":
        settings.warn(
            f"{file.name} asks for the vllm runtime; it is served by this project's own engine, "
            "which --engine vllm replaces where vLLM is installed"
        )
    settings.sources["adapters"] = f"{file.name} inference.adapters"
    adapters = (_from_manifest(settings, adapter, manifest, mounts) for adapter in inference.adapters)
    return {adapter.name: adapter for adapter in adapters}


def _from_manifest(
    settings: LayeredSettings, adapter: AdapterSpec, manifest: WorkspaceDocuments, mounts: Mounts
) -> AdapterSource:
    """Return the adapter from where it lies: mounted already, in an image, or in a directory of this host."""
    mounted = mounts.at(f"/mnt/adapter/{adapter.source.name}")
    reference = adapter.source.image
    if (mounted / "adapter_config.json").is_file() or adapter.source.volume is not None:
        folder = host_path(adapter.source.volume or {})
        if folder is None and not mounted.is_dir() and not mounts.controlled:
            where = f"{manifest.file.name} inference.adapters {adapter.source.name}.volumeSource"
            flag = f"--adapter {adapter.source.name}=DIR"
            settings.warn(f"{where} is no hostPath and nothing is mounted at {mounted}; give {flag} here")
        reference = str(folder if folder and not mounted.is_dir() else mounted)
    return _adapter(adapter.source.name, reference, adapter.strength, str(manifest.file))


def _adapter(name: str, reference: str, strength: float, where: str) -> AdapterSource:
    return parse(
        AdapterSource, {"name": name, "reference": reference, "strength": strength}, f"{where} {name}"
    )


def _choose_model(settings: LayeredSettings, name: str, where: str) -> None:
    preset = put_model(settings, name, where)
    settings.put("served_name", preset.name if preset else Path(name).name, where)


def _put_adapters(
    settings: LayeredSettings, adapters: dict[str, AdapterSource], words: Iterable[str], mounts: Mounts
) -> None:
    """Set the adapters of the manifest, with those of mounts and flags, at their strengths, and sources."""
    if named := mounts.environ.get(ADAPTER_SOURCES_VARIABLE):
        sources = tuple(filter(None, (each.strip() for each in named.split(","))))
        settings.put("adapter_sources", sources, f"environment {ADAPTER_SOURCES_VARIABLE}")
    _add_mounted(settings, adapters, mounts)
    _add_flags(settings, adapters, words)
    _apply_strengths(settings, adapters, mounts.environ)
    settings.put("adapters", tuple(adapters.values()), settings.sources.get("adapters", "default"))


def _add_mounted(settings: LayeredSettings, adapters: dict[str, AdapterSource], mounts: Mounts) -> None:
    """Add every adapter that init containers or volumes put in the pod."""
    for folder in mounts.adapters():
        if folder.name not in adapters:
            adapters[folder.name] = _adapter(folder.name, str(folder), 1.0, "/mnt/adapter")
            settings.sources.setdefault("adapters", "/mnt/adapter")


def _add_flags(settings: LayeredSettings, adapters: dict[str, AdapterSource], words: Iterable[str]) -> None:
    for word in words:
        adapter = adapter_flag(word)
        known = adapters.get(adapter.name)
        if known is not None and known.reference != adapter.reference:
            raise ConfigError(
                f"--adapter {adapter.name}: two adapters of one name, from {known.reference} and "
                f"{adapter.reference}; rename one or leave it out"
            )
        references.check_adapter(adapter.reference, f"--adapter {adapter.name}")
        adapters[adapter.name] = adapter
        settings.sources["adapters"] = "flag --adapter"


def _apply_strengths(
    settings: LayeredSettings, adapters: dict[str, AdapterSource], environ: Mapping[str, str]
) -> None:
    for name, adapter in adapters.items():
        if name in environ:
            strength = _strength(environ[name], f"environment {name}")
            adapters[name] = adapter.model_copy(update={"strength": strength})
            settings.sources["adapters"] = (
                f"{settings.sources.get('adapters', 'default')}, environment {name}"
            )


def _strength(text: str, where: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise ConfigError(f"{where}: strength is {describe(text)}, expected a number from 0 to 1")
    return strength


def _apply_engine_flags(settings: LayeredSettings, flags: Mapping[str, Any], mounts: Mounts) -> None:
    applied = vllm_flags.apply(settings, flags)
    if template := applied.files.get("chat_template"):
        settings.put("model.chat_template", chat_template(template, "--chat-template", mounts), "flag")
    if applied.harmless:
        log.info("flags without effect here: %s", "; ".join(applied.harmless))  # a controller's, no user's


def _apply_config(settings: LayeredSettings, found: ConfigDocument | None, mounts: Mounts) -> None:
    """Lay inference_config.yaml over the settings; name the keys without effect in one warning."""
    if found is None:
        return
    where = found.where.rpartition("/")[2]
    beside = {key: value for key, value in found.values.items() if value is not None}
    engine = beside.pop("vllm", {})
    if not isinstance(engine, dict):
        raise ConfigError(f"{found.where}: 'vllm' is {describe(engine)}, expected keys and values")
    engine = {key: value for key, value in engine.items() if value is not None}
    if settings.get("engine") == "vllm":
        theirs = {key: engine[key] for key in engine if str(key).replace("-", "_") not in SERVER_KEYS}
        settings.put_all("vllm.flags", theirs, where)
        engine = {key: engine[key] for key in engine.keys() - theirs.keys()}
    sections = (("vllm.", engine), ("", beside))
    applied = [vllm_flags.apply(settings, section, f"{where}: {name}") for name, section in sections]
    for name, value in (applied[0].files | applied[1].files).items():
        if name == "chat_template":
            settings.put("model.chat_template", chat_template(value, where, mounts), where)
        else:
            raise ConfigError(f"{where}: {name} is a flag of the command, not a key of this file")
    if harmless := [phrase for each in applied for phrase in each.harmless]:
        settings.warn(f"{where}: without effect here: {'; '.join(harmless)}")


def _beyond(config: ServeConfig) -> tuple[str, ...]:
    """Return a warning where more context is asked for than the preset has; servers know that of others."""
    preset = presets.matching(config.model)
    warning = fit.beyond_the_model(config, preset.context_tokens) if preset else None
    return (warning,) if warning else ()


def _put(settings: LayeredSettings, name: str, value: Any) -> None:
    head = name.partition(".")[0]
    if head not in ServeConfig.model_fields:
        hint = nearest(head, ServeConfig.model_fields) or f"; known: {', '.join(ServeConfig.model_fields)}"
        raise ConfigError(f"--set {name}: unknown setting{hint}")
    if head == "api_key" and isinstance(value, str):
        raise ConfigError("--set api_key: a key must not stand on a command line; use --api-key-env NAME")
    settings.put(name, value, f"flag --set {name}")


def _placeholders(config: ServeConfig) -> tuple[str, ...]:
    found = ((adapter.name, find_placeholders(adapter.reference)) for adapter in config.adapters)
    return tuple(f"adapter {name} still holds the placeholder {word}" for name, word in found if word)
