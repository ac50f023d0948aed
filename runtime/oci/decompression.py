"""Opens the blob of a layer as a forward stream of plain bytes: gzip, zstd, or as it is.

Bounds what a small blob may become, and hashes what it becomes. Every fault of a decoder, and of the tar
reader above it, ends as one RegistryError that names the layer. Knows no entries. Start at `opened`.
"""

import gzip
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import Failure, RegistryError
from runtime.oci.blobs import READ_BYTES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MOST_RATIO = 100
"""An archive that unpacks to more than this many times its size is refused (weights: about 1.1)…"""
ALWAYS_ALLOWED_BYTES = 256 << 20
"""… unless it stays below this size."""

_UNREADABLE = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4"}


class DamagedArchiveError(Exception):
    """The bytes are not what the format allows; `opened` makes a RegistryError of it."""


class PlainStream(Protocol):
    """The unpacked bytes of a layer, read forwards."""

    position: int

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        ...

    def skip_to(self, offset: int) -> None:
        """Go forward to `offset`; DamagedArchiveError when the stream ends before."""
        ...

    def digest(self) -> str:
        """Return the digest of the whole stream, reading what is left of it."""
        ...


def unpacked_limit(blob_bytes: int) -> int:
    """Return how many bytes blobs of this size may become."""
    return max(ALWAYS_ALLOWED_BYTES, MOST_RATIO * blob_bytes)


@contextmanager
def opened(blob: Path, digest: str) -> Iterator[PlainStream]:
    """Yield the unpacked bytes of a blob that is known to have `digest`.

    Raises RegistryError for whatever a decoder, or a reader of the stream, finds wrong with them.
    """
    with blob.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        decoder: Any = None
        if magic.startswith(b"\x1f\x8b"):
            decoder = gzip.GzipFile(fileobj=file)
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            decoder = zstd.ZstdFile(file)
        try:
            if decoder is None:
                yield _Stored(file, blob.stat().st_size, digest)
            else:
                yield _Decoded(decoder, unpacked_limit(blob.stat().st_size))
        except Failure:
            raise
        except Exception as error:  # decoders raise a dozen kinds
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the blob's
                raise
            known = next((f"{name}, " for start, name in _UNREADABLE.items() if magic.startswith(start)), "")
            raise RegistryError(
                f"layer {digest}: {known}not a readable tar archive, plain or in gzip or zstd"
                f" ({' '.join(str(error).split()) or type(error).__name__})"
            ) from None


class _Stored:
    """A blob that is not compressed: what is skipped is not read, and its digest is known."""

    def __init__(self, file: Any, size: int, digest: str):
        self._file, self._size, self._digest = file, size, digest
        self.position = 0

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(min(size, self._size - self.position))
        self.position += len(data)
        return data

    def skip_to(self, offset: int) -> None:
        if offset > self._size:
            raise DamagedArchiveError("it ends in the middle of a file")
        self._file.seek(offset)
        self.position = offset

    def digest(self) -> str:
        return self._digest


class _Decoded:
    """A compressed blob, of which at most `limit` bytes are unpacked."""

    def __init__(self, decoder: Any, limit: int):
        self._decoder, self._limit = decoder, limit
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        chunks = []
        while size and (chunk := self._next(size)):
            chunks.append(chunk)
            size -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def skip_to(self, offset: int) -> None:
        if offset > self._limit:
            raise RegistryError(self._bomb)
        while self.position < offset:
            if not self._next(offset - self.position):
                raise DamagedArchiveError("it ends in the middle of a file")

    def digest(self) -> str:
        while self._next(READ_BYTES):
            pass
        return f"sha256:{self._sha256.hexdigest()}"

    def _next(self, size: int) -> bytes:
        data: bytes = self._decoder.read(min(size, READ_BYTES))
        self.position += len(data)
        if self.position > self._limit:
            raise RegistryError(self._bomb)
        self._sha256.update(data)
        return data

    @property
    def _bomb(self) -> str:
        limit = f"{self._limit} bytes, {MOST_RATIO} times its size"
        return f"a layer unpacks to more than {limit}; refused as a bomb"
