"""The data files of a folder, and their rows as mappings: parquet, JSON, JSONL, CSV, Arrow.

Knows formats, not columns. Start at `find` and `read`; `targets` names the files of addresses.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.settings import DataSource

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
"""Format by file suffix."""


def targets(source: DataSource) -> list[Path]:
    """Return the file of each URL, in their order: its base name, made different where two are alike.

    An address that is listed twice is one file.
    """
    urls = tuple(dict.fromkeys(source.urls))
    names = [_base_name(url) for url in urls]
    lowered = [name.lower() for name in names]  # some file systems do not tell a.parquet from A.parquet
    paths: list[Path] = []
    for url, name in zip(urls, names, strict=True):
        if lowered.count(name.lower()) > 1:
            path = Path(name)
            name = f"{path.stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{path.suffix}"  # noqa: PLW2901
        paths.append(source.folder / name)
    return paths


def _base_name(url: str) -> str:
    name = unquote(urlsplit(url).path).replace("\\", "/").rpartition("/")[2]
    kept = "".join(c if c.isalnum() or c in "._-+ " else "_" for c in name).strip(". ")
    return kept[-120:] or "data"


def find(source: DataSource) -> list[Path]:
    """Return the data files of `source` in path order; DataError telling what is there when none is."""
    if source.file is not None:
        if not source.file.is_file():
            raise DataError(f"{source.file}: no such data file")
        return [source.file]
    if not source.folder.is_dir():
        raise DataError(f"{source.folder}: no such directory, expected one with data files")
    present = sorted(
        path for path in source.folder.rglob("*") if path.is_file() and not _hidden(path, source.folder)
    )
    found = [path for path in present if source.extension or file_format(path)]
    if not found:
        names = ", ".join(path.name for path in present[:5]) or "nothing"
        raise DataError(
            f"{source.folder}: no data file (found {names}); expected parquet, json, jsonl, csv or arrow"
        )
    return found


def file_format(path: Path) -> str | None:
    """Return the format that the name of `path` tells, or None.

    A name may go on after the suffix (`train.parquet_download_true`): downloaders before KAITO 0.7
    kept the URL's query in it.
    """
    name = path.name.lower()
    exact = SUFFIXES.get(path.suffix.lower())
    if exact:
        return exact
    places = {name.rfind(suffix): kind for suffix, kind in SUFFIXES.items() if suffix in name}
    return places[max(places)] if places else None


def read(path: Path, extension: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file as mappings; DataError when it is not what its name says."""
    kind = extension or file_format(path) or _sniff(path)
    try:
        if kind == "parquet":
            yield from _read_parquet(path)
        elif kind == "arrow":
            yield from _read_arrow(path)
        elif kind == "csv":
            yield from _read_csv(path)
        else:
            yield from _read_json(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        start = path.read_bytes()[:40] if path.is_file() else b""
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: not a readable {kind} file ({reason}); it starts with {start!r}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _sniff(path: Path) -> str:
    """Return the format by the file's first bytes: a URL's base name may tell nothing."""
    with path.open("rb") as stream:
        start = stream.read(6)
    return {b"PAR1": "parquet", b"ARRO": "arrow"}.get(start[:4], "json")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    with pa.OSFile(str(path), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            yield from pa.ipc.open_file(stream).read_all().to_pylist()
        else:
            yield from pa.ipc.open_stream(stream).read_all().to_pylist()


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(
                    f"{path.name}: row {number} does not have {len(reader.fieldnames or ())} columns"
                )
            yield row


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSON list, an object with one list in it, or one object a line, whatever the suffix says."""
    with path.open(encoding="utf-8-sig") as stream:
        first = stream.read(1)
        while first and first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            rows = parse_json(stream.read(), path.name)
        elif first == "{":
            rows = _json_objects(stream, path.name)
        else:
            start = stream.read(40)
            raise DataError(f"{path}: not a JSON file; it starts with {start!r}")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{path.name}: row {number} is {describe(row)}, expected an object")
            yield row


def _json_objects(lines: Iterator[str], name: str) -> Iterator[Any]:
    """Yield one object a line, or the rows of a single object spread over lines that holds a list."""
    number = 0
    for line in lines:
        number += 1
        if not line.strip():
            continue
        try:
            first = json.loads(line)
        except json.JSONDecodeError:
            if number > 1:
                raise DataError(f"{name}: row {number} is not valid JSON") from None
            whole = parse_json(line + "".join(lines), name)
            lists = [value for value in whole.values() if isinstance(value, list)]
            yield from lists[0] if len(lists) == 1 else [whole]
            return
        yield first


def parse_json(text: str, name: str) -> Any:
    """Return the JSON value in `text`; DataError naming `name` when it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: not valid JSON: {error.msg} (line {error.lineno})") from None


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts) or path.suffix == ".part"
