"""One table of formats, and the reading of one file by it.

A new format is an entry of `FORMATS` and its reader. Every fault of a reader, and of the libraries below it,
ends here as one DataError that names the file. Start at `read`.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from runtime.errors import ConfigError, DataError, Failure, one_line
from runtime.files import disk_failure
from runtime.tuning.data.formats import columnar, streams
from runtime.tuning.data.formats.delimited import read_delimited
from runtime.tuning.data.formats.json_rows import read_json
from runtime.tuning.data.limits import ByteCount, DataLimitError, DataLimits

Row = Mapping[str, Any]
Rows = Iterator[Row | DataError]

_START_BYTES = 64


@dataclass(frozen=True, slots=True)
class DataFormat:
    """How files of one format are recognised and read."""

    suffixes: tuple[str, ...]
    read: Callable[[Path, ByteCount], Rows]
    magic: tuple[bytes, ...] = ()
    """The first bytes of such files, where they have some of their own."""


def read(path: Path, extension: str | None = None, unpacked: ByteCount | None = None) -> Rows:
    """Yield the rows of one file, each a mapping, or the DataError (without file and row) of a bad one.

    `extension` is its format, where the name does not tell; `unpacked` counts what is read. Raises DataError
    when the file is not what its name says.
    """
    count = unpacked or ByteCount(DataLimits.of(None, path.parent).unpacked)
    kind = kind_of(path, extension)
    try:
        _check_start(path)
        for row in FORMATS[kind].read(path, count):
            count.add_rows(1, 0, path.name)
            yield row
    except DataLimitError:
        raise
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(path.name) else f"{path}: {text}{_start(path)}") from None
    except Failure:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {streams.not_utf8(error)}") from None
    except MemoryError:  # whoever bounds the memory says how much there was
        raise
    except Exception as error:  # pyarrow's, the decompressors', the disk's
        if isinstance(error, OSError) and (failure := disk_failure(error, path)) is not None:
            raise failure from None
        reason = one_line(error, 160) or type(error).__name__
        raise DataError(f"{path}: not a readable {kind} file ({reason}){_start(path)}") from None


def kind_of(path: Path, extension: str | None = None) -> str:
    """Return the format of a file: by `extension`, its name, or its first bytes; else DataError."""
    kind = extension or file_format(path) or _format_by_content(path)
    if kind is None and (advice := instead(path)):
        raise DataError(f"{path}: {advice}")
    if kind is None:
        raise DataError(
            f"{path}: neither its name nor its first bytes tell its format{_start(path)}; say it with "
            f"--set extension=FORMAT, in a file dataset_extension: one of {', '.join(FORMATS)}; plain text "
            'is written as JSON lines, {"text": "…"} one a line'
        )
    return kind


_SPREADSHEET = "a spreadsheet, which is not read: export its sheet as CSV (UTF-8) with a header"
_DOCUMENT = 'a document, which is not read: write its texts as JSON lines, {"text": "…"} one a line'
_ARCHIVE = "an archive, which is not read: unpack it, and give the folder"
_INSTEAD = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers"), _SPREADSHEET),
    **dict.fromkeys((".md", ".rst", ".pdf", ".docx", ".doc", ".rtf", ".odt", ".html"), _DOCUMENT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".joblib"),
        "objects of Python, which are not read: write the rows as Parquet or JSON lines"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb", ".mdb"),
        "a database, which is not read: export the table as Parquet or CSV"),
    **dict.fromkeys((".avro", ".orc", ".tfrecord", ".msgpack", ".h5", ".hdf5", ".xml", ".yaml", ".yml"),
        "of a format that is not read: write the rows as Parquet or JSON lines"),
}  # fmt: skip
"""What to do about files that people have and that are not read, by suffix."""


def instead(path: PurePath) -> str:
    """Return what a file is that is not read, and what to do about it; "" where its name does not tell."""
    return _INSTEAD.get(path.suffix.lower(), "")


def named(text: str, where: str) -> str:
    """Return the format that a user calls `text`; ConfigError for another, beginning with `where`."""
    bare = text.strip().lower().lstrip(".")
    by_suffix = {suffix[1:]: kind for kind, entry in FORMATS.items() for suffix in entry.suffixes}
    if bare in FORMATS or bare in by_suffix:
        return bare if bare in FORMATS else by_suffix[bare]
    advice = f"; it is {found}" if (found := instead(PurePath(f"x.{bare}"))) else ""
    if bare.endswith(tuple(suffix[1:] for suffix in streams.COMPRESSED)):
        advice = "; compression is found by itself"
    raise ConfigError(f"{where} is {text!r}, expected one of {', '.join(FORMATS)}{advice}")


def _start(path: Path) -> str:
    start = streams.first_bytes(path, 40)
    return f"; it starts with {start!r}" if start else ""


def _check_start(path: Path) -> None:
    """Raise DataError for what is not the data but stands for it, whatever the name says."""
    start = streams.first_bytes(path, 40).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError("a pointer of Git LFS and not the data: run `git lfs pull` in the checkout")
    if start.startswith((b"<!doctype html", b"<html")):
        raise DataError("a web page and not data (a login or an error page?)")


def _json(path: Path, unpacked: ByteCount) -> Rows:
    with streams.opened(path, unpacked) as stream:
        yield from read_json(stream, unpacked, path.name, lines=False)


def _json_lines(path: Path, unpacked: ByteCount) -> Rows:
    with streams.opened(path, unpacked) as stream:
        yield from read_json(stream, unpacked, path.name, lines=True)


def _delimited(path: Path, unpacked: ByteCount) -> Rows:
    with streams.opened(path, unpacked) as stream:
        yield from read_delimited(stream)


def _parquet(path: Path, unpacked: ByteCount) -> Rows:
    with _seekable(path, unpacked) as file:
        if cut := columnar.cut_short(file):
            raise DataError(cut)
        yield from columnar.read_parquet(file, unpacked, path.name)


def _arrow(path: Path, unpacked: ByteCount) -> Rows:
    with _seekable(path, unpacked) as file:
        yield from columnar.read_arrow(file, unpacked, path.name)


def _seekable(path: Path, unpacked: ByteCount) -> IO[bytes]:
    """Open a file that is read in any order: a compressed one by way of a file without a name."""
    if not streams.is_compressed(path):
        return path.open("rb")
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's, to close
    with streams.opened(path, unpacked) as stream:
        while data := stream.read(streams.CHUNK_BYTES):
            plain.write(data)
    plain.seek(0)
    return plain


FORMATS = {
    "parquet": DataFormat((".parquet",), _parquet, magic=(b"PAR1",)),
    "json": DataFormat((".json",), _json, magic=(b"{", b"[")),
    "jsonl": DataFormat((".jsonl", ".ndjson"), _json_lines),
    "csv": DataFormat((".csv",), _delimited),
    "tsv": DataFormat((".tsv",), _delimited),
    "arrow": DataFormat((".arrow",), _arrow, magic=(b"ARROW1", b"\xff\xff\xff\xff", b"FEA1")),
    "feather": DataFormat((".feather",), _arrow),
}
"""Formats by the names that `dataset_extension` takes."""


def file_format(path: PurePath) -> str | None:
    """Return the format that the name of `path` tells, or None.

    A name may go on after the suffix (`train.parquet_download_true`): downloaders before KAITO 0.7
    kept the URL's query in it.
    """
    return _parts(path)[1]


def base_name(path: PurePath) -> str:
    """Return the name of `path` without the suffixes of its format and compression."""
    return _parts(path)[0]


def _parts(path: PurePath) -> tuple[str, str | None]:
    name = path.name
    while name.lower().endswith(streams.COMPRESSED):
        name = name.rpartition(".")[0]
    suffixes = {suffix: kind for kind, entry in FORMATS.items() for suffix in entry.suffixes}
    exact = suffixes.get(PurePath(name).suffix.lower())
    if exact:
        return PurePath(name).stem, exact
    for suffix, kind in suffixes.items():
        stem, found, rest = name.lower().rpartition(suffix)
        if found and stem and rest[:1] in _GOES_ON:
            return name[: len(stem)], kind
    return name, None


_GOES_ON = ("_", "-", "?", "&", "=", "%")
"""What may follow a suffix; `rows.jsonl.bak` and `rows.jsonl~` are no data."""


def is_data(path: Path) -> bool:
    """Return whether a file is data by its name, or, where that has no suffix, by its first bytes."""
    bare = "." not in path.name or path.name.lower().endswith(streams.COMPRESSED)
    return file_format(path) is not None or (bare and _format_by_content(path) is not None)


def _format_by_content(path: Path) -> str | None:
    """Return the format by a file's first bytes: a URL's base name may tell nothing."""
    try:
        with streams.opened(path, ByteCount(DataLimits.of(None, path.parent).unpacked)) as stream:
            start = stream.peek(_START_BYTES).lstrip()
    except Exception:  # of the decompressors: whoever reads it says what is wrong
        return None
    return next(
        (kind for kind, entry in FORMATS.items() if entry.magic and start.startswith(entry.magic)), None
    )
