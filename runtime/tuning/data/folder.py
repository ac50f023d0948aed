"""Which files of a folder are data, and what each is for: of any tool that writes folders.

Knows Hugging Face's `save_to_disk`, checkouts of its hub, and Spark's outputs; does not know what is in data
files, nor tables with a history (lakes.py). Start at `find`; `local_paths` says under which names addresses
are stored.
"""

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from runtime.errors import DataError
from runtime.logs import counted, once
from runtime.tuning.data import hub_card, lakes, splits
from runtime.tuning.data.formats import FORMATS, base_name, file_format, instead, is_data
from runtime.tuning.data.splits import Split
from runtime.tuning.data.urls import unsigned

log = logging.getLogger(__name__)

_STATE = "state.json"
"""Of `save_to_disk`: names the Arrow files; others beside it are caches."""
_ABOUT_DATA = frozenset(("dataset_info", "dataset_infos", "dataset_dict", "state", "croissant", "package"))
"""Names of JSON files that tools write beside data."""
_PERHAPS_ABOUT_DATA = frozenset((
    "metadata", "meta", "config", "info", "schema", "stats", "statistics", "manifest", "license", "citation",
    # of models, tokenizers and runs, as transformers, peft and trl write them
    "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "chat_template",
    "generation_config", "preprocessor_config", "processor_config", "adapter_config", "quantize_config",
    "ds_config", "model_index", "model.safetensors.index", "pytorch_model.bin.index", "trainer_state",
    "training_args", "training_config", "metrics", "results", "all_results", "train_results", "eval_results",
    "validation_results", "test_results", "predict_results",
))  # fmt: skip
"""Names of JSON files that are about other files, where there are any."""
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)")


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One data file."""

    path: Path
    name: str
    """Its path below the data folder, for messages."""
    split: Split


def find(folder: Path, *, file: Path | None = None, extension: str | None = None) -> list[FoundFile]:
    """Return the data files below `folder` in path order, or `file` alone where it is given.

    With `extension` only files of that suffix are data, or, where none has it, all files. DataError, listing
    what is there, when there is none.
    """
    if file is not None:
        if not file.is_file():
            raise DataError(f"{file}: no such data file")
        return [FoundFile(file, file.name, "train")]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such directory, expected one with data files")
    folder = _checkout(folder)
    every = data_files(folder, extension)
    found = lakes.current(folder, every)
    _say_left_out(folder, set(every) - set(found), "a table has removed them")
    if not found:
        present = sorted(path for path in folder.rglob("*") if path.is_file())
        names = ", ".join(path.relative_to(folder).as_posix() for path in present[:5]) or "nothing"
        *others, last = FORMATS
        advice = next((f"; {path.name} is {unread}" for path in present if (unread := instead(path))), "")
        raise DataError(
            f"{folder}: no data file (found {names}); expected {', '.join(others)} or {last}{advice}"
        )
    if extension is not None:
        _say_left_out(folder, set(data_files(folder)) - set(every), f"they are no {extension} files")
    return _chosen(folder, found)


def data_files(folder: Path, extension: str | None = None) -> list[Path]:
    """Return the files below `folder` that are data, by their names or (without a suffix) first bytes."""
    present = sorted(path for path in folder.rglob("*") if path.is_file())
    caches = _beside_saved(present)
    possible = [path for path in present if not _hidden(path.relative_to(folder)) and path not in caches]
    if extension is not None:
        return [path for path in possible if file_format(path) == extension] or possible
    return [path for path in possible if is_data(path)]


def listed(files: Sequence[Path]) -> list[FoundFile]:
    """Return files that are given one by one, with the splits that their names tell."""
    names = [PurePath(path.name) for path in files]
    _check_shards(names)
    return [
        FoundFile(path, path.name, split) for path, split in zip(files, splits.assign(names), strict=True)
    ]


def _checkout(folder: Path) -> Path:
    """Return the checkout in a folder of the hub's cache, which also holds its files under other names."""
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if not snapshots.is_dir() or not (folder / "blobs").is_dir():
        return folder
    if main.is_file() and (found := snapshots / main.read_text(errors="replace").strip()).is_dir():
        return found
    revisions = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(revisions) != 1:
        raise DataError(f"{snapshots}: has {len(revisions)} revisions; give the folder of one as --data")
    return revisions[0]


def _chosen(folder: Path, found: list[Path]) -> list[FoundFile]:
    """Return the data files among those with a known format: the card's, or all that are not about others."""
    card = hub_card.read_card(folder, found)
    if card is not None:
        kept, told = list(card), list(card.values())
        why = "its README.md does not name them"
    else:
        kept = [path for path in found if not _about(path, _PERHAPS_ABOUT_DATA)] or found
        told = splits.assign([path.relative_to(folder) for path in kept])
        why = "of names that mean a description of data"
    _say_left_out(folder, set(found) - set(kept), why)
    _check_shards([path.relative_to(folder) for path in kept])
    _check_kinds(
        [path.relative_to(folder) for path, split in zip(kept, told, strict=True) if split == "train"]
    )
    return [
        FoundFile(path, path.relative_to(folder).as_posix(), split)
        for path, split in zip(kept, told, strict=True)
    ]


def _say_left_out(folder: Path, files: Collection[Path], why: str) -> None:
    if files:
        names = [path.relative_to(folder).as_posix() for path in sorted(files)]
        count = counted(len(names), "file")
        once(log, logging.INFO, f"{folder}: {count} left out, because {why} ({', '.join(names[:5])})")


def _hidden(name: PurePath) -> bool:
    """Return whether a file is not data by its name: hidden for Unix or Hadoop, unfinished, or about data."""
    if any(part.startswith((".", "_", "~")) for part in name.parts) or name.suffix in (".part", ".crc"):
        return True
    return _about(name, _ABOUT_DATA)


def _about(name: PurePath, stems: frozenset[str]) -> bool:
    return name.suffix.lower() == ".json" and name.stem.lower() in stems


def _beside_saved(present: Sequence[Path]) -> set[Path]:
    """Return Arrow files that lie in a folder of `save_to_disk` but are not its data."""
    caches: set[Path] = set()
    for state in (path for path in present if path.name == _STATE):
        try:
            entries = json.loads(state.read_bytes())["_data_files"]
            names = {str(entry["filename"]) for entry in entries}
        except (ValueError, TypeError, LookupError, RecursionError):
            continue  # another tool's
        own = {path.name: path for path in present if path.parent == state.parent and path.suffix == ".arrow"}
        missing = sorted(names - own.keys())
        if missing:
            raise DataError(f"{state}: names {missing[0]}, which is not there: the copy is not complete")
        caches |= {path for name, path in own.items() if name not in names}
    return caches


def _check_shards(names: Sequence[PurePath]) -> None:
    """Warn of data of which numbered parts are missing: `train-00000-of-00003` says how many there are."""
    parts: defaultdict[tuple[PurePath, str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := _SHARD.fullmatch(base_name(name)):
            parts[name.parent, match[1], int(match[3])].add(int(match[2]))
    for (parent, stem, total), numbers in parts.items():
        if len(numbers) < total:
            once(log, logging.WARNING, f"{parent / stem}: only {len(numbers)} of its {total} parts are there")


def _check_kinds(names: Sequence[PurePath]) -> None:
    """Warn of rows for several ways of training, such as pairs to prefer beside answers to learn."""
    kinds = splits.training_kinds(names)
    if len(kinds) > 1:
        once(
            log,
            logging.WARNING,
            f"{' and '.join(kinds)} are all trained on, though their names say that they are for different "
            "ways of training and they may hold the same prompts; --data with the folder or file of one "
            "trains on that alone",
        )


def local_paths(urls: Sequence[str], folder: Path) -> list[Path]:
    """Return the file in `folder` of each URL, in their order: its base name, changed where two are alike.

    A URL that is listed twice is one file. A name stays the same when the signature of its URL is renewed.
    """
    distinct = tuple(dict.fromkeys(urls))
    names = [_file_name(url) for url in distinct]
    lowered = [name.lower() for name in names]  # some file systems do not tell a.parquet from A.parquet
    paths: list[Path] = []
    for url, name in zip(distinct, names, strict=True):
        if lowered.count(name.lower()) > 1:
            stem = base_name(PurePath(name))
            digest = hashlib.sha256(unsigned(url).encode()).hexdigest()[:12]
            name = f"{stem}-{digest}{name.removeprefix(stem)}"  # noqa: PLW2901
        paths.append(folder / name)
    return paths


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path).replace("\\", "/").rpartition("/")[2]
    kept = "".join(c if c.isalnum() or c in "._-+ " else "_" for c in name).strip(". ")
    return kept[-120:] or "data"
