"""A file as the bytes that readers of text want: out of its compression, counted, in UTF-8 without a mark.

Compressions and encodings are told by the first bytes: names go wrong when files are downloaded. Knows no
formats. Start at `opened` and `utf8`.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from runtime.errors import DataError
from runtime.tuning.data.limits import ByteCount

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK_BYTES = 1 << 20

_DECODERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\x28\xb5\x2f\xfd": zstd.ZstdFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"""By the first bytes of a compressed file."""

COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
"""Suffixes of compressed files, after the format's."""

_ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x04\x22\x4d\x18": "lz4"}
"""What is not read, by its first bytes."""

_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""By byte order mark; UTF-32's begin with UTF-16's."""


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file as it is; none when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed in a way that `opened` reads."""
    return first_bytes(path, 8).startswith(tuple(_DECODERS))


@contextlib.contextmanager
def opened(path: Path, unpacked: ByteCount) -> Iterator[io.BufferedReader]:
    """Yield the bytes of a file, decompressed, each counted in `unpacked` as it is read."""
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        for magic, name in _ARCHIVES.items():
            if start.startswith(magic):
                raise DataError(f"is packed as {name}, which is not read: unpack it, or use gzip or zstd")
        decoder = next((found for magic, found in _DECODERS.items() if start.startswith(magic)), None)
        with decoder(file) if decoder else contextlib.nullcontext(file) as plain:
            yield io.BufferedReader(_Counted(plain, unpacked, path.name), CHUNK_BYTES)


class _Counted(io.RawIOBase):
    """Passes bytes on, and counts them."""

    def __init__(self, stream: IO[bytes], unpacked: ByteCount, name: str) -> None:
        self._stream, self._unpacked, self._name = stream, unpacked, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._unpacked.add(len(data), self._name)
        buffer[: len(data)] = data
        return len(data)


def utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """Return a text's bytes as UTF-8, its byte order mark taken away; UTF-16 and UTF-32 need theirs.

    Bytes that are no UTF-8 stay in the result: the reader finds, and names, the row they are in.
    """
    start = stream.peek(4)[:4]
    for mark, encoding in _ENCODINGS.items():
        if start.startswith(mark):
            stream.read(len(mark))
            if encoding == "utf-8":
                return stream
            return io.BufferedReader(_Transcoded(stream, encoding), CHUNK_BYTES)
    if len(start) == 4 and (start[1] == start[3] == 0 or start[0] == start[2] == 0):
        raise DataError("is UTF-16 or UTF-32 text without a byte order mark: save it as UTF-8")
    return stream


class _Transcoded(io.RawIOBase):
    """Text of another encoding as UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._stream.read(CHUNK_BYTES)
            self._pending = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        taken = self._pending[: len(buffer)]
        self._pending = self._pending[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return what is wrong with text that is not UTF-8, and what it probably is."""
    byte = error.object[error.start]
    return (
        f"is not UTF-8 text (byte 0x{byte:02x} at {error.start}; Windows-1252 or Latin-1, perhaps): "
        "save it as UTF-8"
    )
