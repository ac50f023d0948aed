"""The data files of a folder, and their rows as mappings: one table of formats, and a reader for each.

Knows formats, not columns. A new one is an entry of `FORMATS` and its reader. Start at `find` and `read`;
`local_paths` says under which names addresses are stored. pyarrow is imported when a file is read.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from runtime.config import describe
from runtime.errors import DataError, one_line

Row = dict[str, Any]


def local_paths(urls: Sequence[str], folder: Path) -> list[Path]:
    """Return the file in `folder` of each URL, in their order: its base name, changed where two are alike.

    A URL that is listed twice is one file.
    """
    distinct = tuple(dict.fromkeys(urls))
    names = [_base_name(url) for url in distinct]
    lowered = [name.lower() for name in names]  # some file systems do not tell a.parquet from A.parquet
    paths: list[Path] = []
    for url, name in zip(distinct, names, strict=True):
        if lowered.count(name.lower()) > 1:
            path = Path(name)
            name = f"{path.stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{path.suffix}"  # noqa: PLW2901
        paths.append(folder / name)
    return paths


def _base_name(url: str) -> str:
    name = unquote(urlsplit(url).path).replace("\\", "/").rpartition("/")[2]
    kept = "".join(c if c.isalnum() or c in "._-+ " else "_" for c in name).strip(". ")
    return kept[-120:] or "data"


def find(folder: Path, *, file: Path | None = None, extension: str | None = None) -> list[Path]:
    """Return the data files below `folder` in path order, or `file` alone where it is given.

    With `extension` files of any suffix are data. DataError, listing what is there, when there is none.
    """
    if file is not None:
        if not file.is_file():
            raise DataError(f"{file}: no such data file")
        return [file]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such directory, expected one with data files")
    present = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    found = [path for path in present if extension or file_format(path)]
    if not found:
        names = ", ".join(path.name for path in present[:5]) or "nothing"
        *others, last = FORMATS
        raise DataError(f"{folder}: no data file (found {names}); expected {', '.join(others)} or {last}")
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts) or path.suffix == ".part"


def file_format(path: Path) -> str | None:
    """Return the format that the name of `path` tells, or None.

    A name may go on after the suffix (`train.parquet_download_true`): downloaders before KAITO 0.7
    kept the URL's query in it.
    """
    name = path.name.lower()
    suffixes = {suffix: kind for kind, entry in FORMATS.items() for suffix in entry.suffixes}
    exact = suffixes.get(path.suffix.lower())
    if exact:
        return exact
    positions = {name.rfind(suffix): kind for suffix, kind in suffixes.items() if suffix in name}
    return positions[max(positions)] if positions else None


def read(path: Path, extension: str | None = None) -> Iterator[Row]:
    """Yield the rows of one file as mappings; DataError when it is not what its name says."""
    kind = extension or file_format(path) or _format_by_content(path)
    try:
        yield from FORMATS[kind].read(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, NotImplementedError, OSError, csv.Error) as error:  # pyarrow's are of the first three
        start = path.read_bytes()[:40] if path.is_file() else b""
        reason = one_line(error, 160)
        raise DataError(f"{path}: not a readable {kind} file ({reason}); it starts with {start!r}") from None


def _format_by_content(path: Path) -> str:
    """Return the format by the file's first bytes: a URL's base name may tell nothing."""
    with path.open("rb") as stream:
        start = stream.read(max(len(entry.magic) for entry in FORMATS.values()))
    return next(
        (kind for kind, entry in FORMATS.items() if entry.magic and start.startswith(entry.magic)), "json"
    )


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.ipc

    with pa.OSFile(str(path), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            yield from pa.ipc.open_file(stream).read_all().to_pylist()
        else:
            yield from pa.ipc.open_stream(stream).read_all().to_pylist()


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(
                    f"{path.name}: row {number} does not have {len(reader.fieldnames or ())} columns"
                )
            yield row


def _read_json(path: Path) -> Iterator[Row]:
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
            single = parse_json(line + "".join(lines), name)
            lists = [value for value in single.values() if isinstance(value, list)]
            yield from lists[0] if len(lists) == 1 else [single]
            return
        yield first


def parse_json(text: str, name: str) -> Any:
    """Return the JSON value in `text`; DataError naming `name` when it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: not valid JSON: {error.msg} (line {error.lineno})") from None


@dataclass(frozen=True, slots=True)
class DataFormat:
    """How files of one format are recognised and read."""

    suffixes: tuple[str, ...]
    read: Callable[[Path], Iterator[Row]]
    magic: bytes = b""
    """The first bytes of such files, where they have some of their own."""


FORMATS = {
    "parquet": DataFormat((".parquet",), _read_parquet, magic=b"PAR1"),
    "json": DataFormat((".json",), _read_json),
    "jsonl": DataFormat((".jsonl", ".ndjson"), _read_json),
    "csv": DataFormat((".csv",), _read_csv),
    "arrow": DataFormat((".arrow",), _read_arrow, magic=b"ARROW1"),
}
"""Formats by the names that `dataset_extension` takes."""
