"""Finds the training_config.yaml that applies, and lays `--set Section.key=value` over it.

Knows flags and YAML_FILE_PATH; config_maps.py knows the other places, sections.py the content. Start at
`find`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.workspace import config_maps, sections
from runtime.workspace.manifest import WorkspaceDocuments
from runtime.workspace.mounts import Mounts


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
    named = config or mounts.environ.get("YAML_FILE_PATH")
    if named:
        found = config_maps.read(Path(named), sections.KEY)
        return sections.of(found.values, found.where), str(named)
    document = config_maps.find(manifest, sections.KEY, mounts.training_config)
    return (sections.of(document.values, document.where), document.where) if document else ({}, "")
