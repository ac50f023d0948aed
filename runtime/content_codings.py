"""Files out of the content codings that HTTP servers put on them (RFC 9110, 8.4): gzip, deflate, zstd.

Decodes forwards, in blocks, so that memory stays small whatever a body becomes. Does not know requests. Start
at `names` and `decode`.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import DataError, one_line
from runtime.files import disk_errors

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_BLOCK_BYTES = 1 << 20
_MOST_CODINGS = 4


class _Inflated(io.RawIOBase):
    """The data in "deflate", which is zlib's format, or, by mistake of many servers, the bare data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""
        self._decoder: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = self._rest or self._file.read(_BLOCK_BYTES)
            if self._decoder is None and data:  # zlib's first byte ends in 8
                self._decoder = zlib.decompressobj(zlib.MAX_WBITS if data[0] & 15 == 8 else -zlib.MAX_WBITS)
            if self._decoder is None or self._decoder.eof:
                return 0
            if not data:
                raise EOFError("it ends early")
            plain = self._decoder.decompress(data, len(buffer))
            self._rest = self._decoder.unconsumed_tail
            if plain:
                buffer[: len(plain)] = plain
                return len(plain)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "deflate": lambda file: io.BufferedReader(_Inflated(file), _BLOCK_BYTES),
    "zstd": zstd.ZstdFile,
}


def names(header: str) -> tuple[str, ...]:
    """Return the codings of a Content-Encoding header in the order in which they were put on.

    Raises DataError, naming it, for one that is not read here.
    """
    written = [name.strip().lower() for name in header.split(",")]
    codings = tuple(name.removeprefix("x-") for name in written if name not in {"", "identity"})
    unknown = next((name for name in codings if name not in _DECODERS), None)
    if unknown is not None or len(codings) > _MOST_CODINGS:
        raise DataError(
            f"sent in the coding {header[:60]!r}, which was not asked for and is not read here (only "
            f"{', '.join(_DECODERS)}); have the server send the file as it is"
        )
    return codings


def decode(source: Path, target: Path, codings: tuple[str, ...], count: Callable[[int], object]) -> None:
    """Write to `target` what `source` holds under `codings`; `count` is told of each block's bytes.

    Raises DataError where the data is not what the codings say.
    """
    with ExitStack() as opened, disk_errors(target):
        stream: Any = opened.enter_context(source.open("rb"))
        written = opened.enter_context(target.open("wb"))
        for coding in reversed(codings):
            stream = opened.enter_context(_DECODERS[coding](stream))
        while data := _read(stream, codings):
            count(len(data))
            written.write(data)


def _read(stream: Any, codings: tuple[str, ...]) -> bytes:
    try:
        data: bytes = stream.read(_BLOCK_BYTES)
    except Exception as error:  # each decoder raises its own kinds
        if isinstance(error, OSError) and error.errno is not None:  # the disk's
            raise
        raise DataError(
            f"not the {', '.join(codings)} that its Content-Encoding says it is ({one_line(error, 80)})"
        ) from None
    return data
