"""The README.md of a data set from the Hugging Face Hub: which of its files are data, and of what split.

Knows the card's `configs`, by which the hub's own library chooses files, and nothing of what is in these.
Start at `read_card`.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.config import yaml_documents
from runtime.errors import ConfigError, DataError
from runtime.tuning.data.splits import Split, named

_MOST_BYTES = 1 << 20


def read_card(folder: Path, present: Sequence[Path]) -> dict[Path, Split] | None:
    """Return the data files among `present` that the card in `folder` names, with their splits.

    None without a card, or when it names none. DataError when it describes several data sets and no default.
    """
    configs = _configs(folder / "README.md")
    if not configs:
        return None
    chosen = _chosen(configs, folder)
    found: dict[Path, Split] = {}
    for split, pattern in _patterns(chosen):
        for path in present:
            if fnmatchcase(path.relative_to(folder).as_posix(), pattern):
                found.setdefault(path, split)
    return found or None


def _configs(card: Path) -> list[dict[str, Any]]:
    """Return the entries of `configs` that name files; none when the card cannot be read."""
    if not card.is_file() or card.stat().st_size > _MOST_BYTES:
        return []
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    if not text.startswith("---"):
        return []
    header = text.partition("\n")[2].partition("\n---")[0]
    try:
        documents = yaml_documents(header, str(card))
    except ConfigError:  # a person's page: what it does not say, file names do
        return []
    configs = documents[0].get("configs") if documents else None
    if not isinstance(configs, list):
        return []
    return [entry for entry in configs if isinstance(entry, dict) and entry.get("data_files")]


def _chosen(configs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    default = [entry for entry in configs if entry.get("default") is True]
    default += [entry for entry, name in zip(configs, names, strict=True) if name == "default"]
    if default:
        return default[0]
    if len(configs) == 1:
        return configs[0]
    files = [pattern for entry in configs for _, pattern in _patterns(entry)]
    raise DataError(
        f"{folder}: its README.md describes {len(configs)} data sets ({', '.join(names[:10])}); "
        f"give the folder or the file of one as --data ({', '.join(files[:3])})"
    )


def _patterns(config: dict[str, Any]) -> Iterator[tuple[Split, str]]:
    """Yield split and glob pattern of each of a configuration's `data_files`, in any of the forms it has."""
    files = config["data_files"]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    base = str(config.get("data_dir") or "")
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (
            ("train", entry) if not isinstance(entry, dict) else (entry.get("split"), entry.get("path"))
        )
        for path in paths if isinstance(paths, list) else [paths]:
            yield named(str(split)), str(PurePosixPath(base, str(path))).replace("**/", "*")
