"""Finds the training_config.yaml that counts, and lays `--set Section.key=value` over it.

Knows the places, in order; sections.py knows what is in it. Start at `find`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.workspace import sections
from runtime.workspace.manifest import ConfigMap, Workspace
from runtime.workspace.mounts import Mounts

STOCK_CONFIGS = ("qlora-params-template", "lora-params-template")
"""ConfigMaps that every controller brings itself; our defaults stand for them."""


@dataclass(frozen=True, slots=True)
class WorkspaceDocuments:
    """A file that was read: its Workspace and the ConfigMaps beside it."""

    file: Path
    workspace: Workspace
    maps: list[ConfigMap]


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The raw sections, and how to call the place where each of their keys stands."""

    raw: dict[str, Any]
    where: str
    """The file, as errors name it."""
    from_flags: Mapping[str, str]
    """"Section.key" -> source, for keys that `--set` wrote."""
    given: bool
    """Whether there is a file at all."""

    def label(self, key: str) -> str:
        """Return the words for the place of "Section.key"."""
        name = self.where.rpartition("/")[2]
        return self.from_flags.get(key, f"{name} {key}".strip())


def find(
    config: Path | None, manifest: WorkspaceDocuments | None, mounts: Mounts, overrides: Mapping[str, Any]
) -> ConfigFile:
    """Return the sections that count: of `config`, YAML_FILE_PATH, a ConfigMap in the file, or the mount."""
    raw, where = _read(config, manifest, mounts)
    from_flags = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if dot and section in sections.SECTIONS:
            if not isinstance(raw.get(section, {}), dict):
                raise ConfigError(f"{where}: '{section}' must hold keys and values")
            raw = {**raw, section: {**raw.get(section, {}), name: value}}
            from_flags[key] = f"flag --set {key}"
    return ConfigFile(raw, where or "--set", from_flags, given=bool(where))


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
    holding = [found for found in manifest.maps if sections.KEY in found.data] if manifest else []
    chosen = [found for found in holding if found.metadata.name == wanted] if wanted else holding[:1]
    if manifest and chosen:
        where = f"{manifest.file} ConfigMap {chosen[0].metadata.name}"
        return sections.from_map(chosen[0], str(manifest.file)), where
    if mounts.training_config.is_file():
        return sections.read(mounts.training_config), str(mounts.training_config)
    if manifest and wanted and wanted not in STOCK_CONFIGS:
        hint = nearest(wanted, [found.metadata.name for found in holding])
        raise ConfigError(
            f"{manifest.file}: 'tuning.config' names ConfigMap {wanted!r}, which is not in this file{hint}; "
            "add it there or give --config FILE"
        )
    return {}, ""
