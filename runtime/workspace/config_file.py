"""Finds the training_config.yaml that applies, and lays `--set Section.key=value` over it.

Knows the locations and their order; sections.py knows the content. Start at `find`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.workspace import sections
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.mounts import Mounts

STOCK_CONFIGS = ("qlora-params-template", "lora-params-template")
"""ConfigMaps that every controller installs itself; our defaults stand in for them."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The raw sections of a file, and how messages name the place of each key."""

    raw: dict[str, Any]
    where: str
    """The file, as error messages name it."""
    from_flags: Mapping[str, str]
    """"Section.key" -> source, for keys that `--set` wrote."""
    exists: bool
    """Whether there is a file at all, not only flags."""

    def label(self, key: str) -> str:
        """Return how messages name the place of "Section.key"."""
        name = self.where.rpartition("/")[2]
        return self.from_flags.get(key, f"{name} {key}".strip())


def find(
    config: Path | None, manifest: WorkspaceDocuments | None, mounts: Mounts, overrides: Mapping[str, Any]
) -> ConfigFile:
    """Return the sections of the first that exists of `config`, YAML_FILE_PATH, a ConfigMap and the mount."""
    raw, where = _read(config, manifest, mounts)
    from_flags = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if dot and section in sections.SECTIONS:
            if not isinstance(raw.get(section, {}), dict):
                raise ConfigError(f"{where}: '{section}' must hold keys and values")
            raw = {**raw, section: {**raw.get(section, {}), name: value}}
            from_flags[key] = f"flag --set {key}"
    return ConfigFile(raw, where or "--set", from_flags, exists=bool(where))


def _read(
    config: Path | None, manifest: WorkspaceDocuments | None, mounts: Mounts
) -> tuple[dict[str, Any], str]:
    """Return the sections and the name of their place, which is "" when there is none."""
    named = mounts.environ.get("YAML_FILE_PATH")
    if config is not None:
        return sections.read(config), str(config)
    if named:
        return sections.read(Path(named)), named
    wanted = manifest.workspace.tuning.config if manifest and manifest.workspace.tuning else ""
    holding = [each for each in manifest.config_maps if sections.KEY in each.data] if manifest else []
    chosen = [each for each in holding if each.metadata.name == wanted] if wanted else holding[:1]
    if manifest and chosen:
        where = f"{manifest.file} ConfigMap {chosen[0].metadata.name}"
        return sections.from_map(chosen[0], str(manifest.file)), where
    if mounts.training_config.is_file():
        return sections.read(mounts.training_config), str(mounts.training_config)
    if manifest and wanted and wanted not in STOCK_CONFIGS:
        hint = nearest(wanted, [each.metadata.name for each in holding])
        raise ConfigError(
            f"{manifest.file}: 'tuning.config' names ConfigMap {wanted!r}, which is not in this file{hint}; "
            "add it there or give --config FILE"
        )
    return {}, ""
