"""Which ConfigMap, file or mount holds the configuration of a Workspace, and the one document in it.

Knows where to look and in which order, not what the document says (sections.py, servers.py). Start at
`find`; `read` is for a file that a command line names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import nearest, read_text, yaml_documents
from runtime.errors import ConfigError
from runtime.workspace.manifest import WorkspaceDocuments, config_map
from runtime.workspace.schema import ConfigMap

STOCK = ("qlora-params-template", "lora-params-template", "inference-params-template")
"""ConfigMaps that every controller installs itself; our defaults stand in for them."""


@dataclass(frozen=True, slots=True)
class ConfigDocument:
    """The content of a configuration file."""

    values: dict[str, Any]
    where: str
    """Its place, as messages name it."""


def find(manifest: WorkspaceDocuments | None, key: str, mounted: Path) -> ConfigDocument | None:
    """Return the document under `key` in the ConfigMap that the Workspace names, else the mounted file.

    A Workspace that names none gets the one ConfigMap of its file that has `key`. Raises ConfigError for a
    name that is nowhere, and where several ConfigMaps could be meant.
    """
    wanted = _wanted(manifest)
    if manifest is not None:
        beside = chosen(manifest, key)
        if beside is not None:
            return of(beside, key, str(manifest.file))
    if mounted.is_file():
        return read(mounted, key)
    if manifest is not None and wanted and wanted not in STOCK:
        hint = nearest(wanted, [each.metadata.name for each in manifest.config_maps])
        raise ConfigError(
            f"{manifest.file}: '{manifest.work}.config' names ConfigMap {wanted!r}, which is not in this "
            f"file{hint}; add it there or give --config FILE"
        )
    return None


def _wanted(manifest: WorkspaceDocuments | None) -> str:
    if manifest is None:
        return ""
    spec = manifest.workspace.tuning or manifest.workspace.inference
    return spec.config if spec else ""


def chosen(manifest: WorkspaceDocuments, key: str) -> ConfigMap | None:
    """Return the ConfigMap beside the Workspace that it names, or the only one with `key`; see `find`."""
    wanted = _wanted(manifest)
    if wanted:
        named = [each for each in manifest.config_maps if each.metadata.name == wanted]
    else:
        named = [each for each in manifest.config_maps if key in each.data]
    here = [each for each in named if _same_namespace(manifest, each)]
    if named and not here and wanted:
        raise ConfigError(
            f"{manifest.file}: ConfigMap {wanted} is in namespace {named[0].metadata.namespace!r}, "
            f"the Workspace in {manifest.workspace.metadata.namespace!r}, expected the same"
        )
    if len(here) > 1:
        names = " and ".join(each.metadata.name for each in here)
        raise ConfigError(
            f"{manifest.file}: ConfigMaps {names} hold '{key}'; "
            f"name the one meant in '{manifest.work}.config'"
        )
    return here[0] if here else None


def _same_namespace(manifest: WorkspaceDocuments, config_map: ConfigMap) -> bool:
    own, its = manifest.workspace.metadata.namespace, config_map.metadata.namespace
    return own == its or not own or not its  # kubectl's --namespace may add the missing one


def read(path: Path, key: str) -> ConfigDocument:
    """Return the document of a file: bare, or under `key` in a ConfigMap."""
    documents = yaml_documents(read_text(path), str(path))
    bare = [document for document in documents if "kind" not in document]
    if bare:
        return ConfigDocument(_only(documents, str(path)), str(path))
    maps = [config_map(each, str(path)) for each in documents if each["kind"] == "ConfigMap"]
    holding = [each for each in maps if key in each.data]
    if documents and len(holding) != 1:
        found = " and ".join(each.metadata.name for each in holding) or "none"
        raise ConfigError(
            f"{path}: expected {key}'s content or one ConfigMap with the key '{key}', found {found}"
        )
    return of(holding[0], key, str(path)) if holding else ConfigDocument({}, str(path))


def of(config_map: ConfigMap, key: str, file: str) -> ConfigDocument:
    """Return the document under `key` in a ConfigMap of `file`."""
    where = f"{file} ConfigMap {config_map.metadata.name}"
    if key not in config_map.data:
        held = ", ".join(f"'{each}'" for each in config_map.data) or "nothing"
        raise ConfigError(f"{where}: key '{key}' is missing in 'data', which holds {held}")
    return ConfigDocument(_only(yaml_documents(config_map.data[key], where), where), where)


def _only(documents: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    """Return the one document; {} where all lines are comments."""
    if len(documents) > 1:
        raise ConfigError(f"{where}: holds {len(documents)} documents, expected one")
    return documents[0] if documents else {}


def unnamed(manifest: WorkspaceDocuments | None, key: str) -> Iterator[str]:
    """Yield a warning where the ConfigMap that `find` takes is not named by the Workspace."""
    beside = chosen(manifest, key) if manifest is not None else None
    if manifest is not None and beside is not None and not _wanted(manifest):
        field, name = f"{manifest.work}.config", beside.metadata.name
        yield (
            f"{manifest.file.name}: ConfigMap {name} is used, but '{field}' does not name it: a controller "
            f"takes its defaults; write '{field}: {name}'"
        )
