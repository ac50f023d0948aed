"""Blobs: bytes with a digest that can be read again from any offset, from files or memory.

A plain tar layer is never written to disk: its headers are kept and the files are read in place, so a
push of any size costs no space and an upload can resume anywhere. Does not know images or registries.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from runtime.errors import ConfigError
from runtime.files import sha256

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

READ_BYTES = 1 << 20
"""How much is read at a time: large enough for disk and sockets, small enough to hold per upload."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What an OCI manifest says about a blob."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the descriptor as it stands in a manifest."""
        entry: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return entry | ({"annotations": self.annotations} if self.annotations else {})


class Reader(Protocol):
    """An open blob."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, b"" at the end."""
        ...

    def close(self) -> None:
        """Release the file behind it."""
        ...


class Blob(Protocol):
    """Bytes that hash to `descriptor.digest`."""

    @property
    def descriptor(self) -> Descriptor:
        """Digest, size and media type."""
        ...

    def open(self, offset: int = 0) -> Reader:
        """Return a reader that starts at `offset`."""
        ...


@dataclass(frozen=True, slots=True)
class BlobPart:
    """A run of bytes: `data`, or the first `size` bytes of the file at `path`."""

    size: int
    data: bytes = b""
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class BlobParts:
    """A blob that consists of consecutive parts."""

    descriptor: Descriptor
    parts: tuple[BlobPart, ...]

    def open(self, offset: int = 0) -> Reader:
        """Return a reader that starts at `offset`."""
        return PartsReader(self.parts, offset)


class PartsReader:
    """Reads consecutive parts as one stream, opening one file at a time."""

    def __init__(self, parts: Sequence[BlobPart], offset: int = 0):
        self._parts = list(parts)
        self._index = 0
        self._position = offset  # within the part at _index
        self._file: Any = None
        while self._index < len(self._parts) and self._position >= self._parts[self._index].size:
            self._position -= self._parts[self._index].size
            self._index += 1

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes (at most READ_BYTES at once), b"" at the end."""
        wanted = READ_BYTES if size < 0 else min(size, READ_BYTES)
        chunks: list[bytes] = []
        while wanted and self._index < len(self._parts):
            part = self._parts[self._index]
            data = self._read_part(part, min(wanted, part.size - self._position))
            chunks.append(data)
            wanted -= len(data)
            self._position += len(data)
            if self._position == part.size:
                self.close()
                self._index, self._position = self._index + 1, 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _read_part(self, part: BlobPart, size: int) -> bytes:
        if part.path is None:
            return part.data[self._position : self._position + size]
        if self._file is None:
            self._file = part.path.open("rb", buffering=0)
            self._file.seek(self._position)
        data: bytes = self._file.read(size)
        if not data:
            raise ConfigError(
                f"{part.path}: became shorter while it was being pushed; do not write to it meanwhile"
            )
        return data

    def close(self) -> None:
        """Close the open file; a later read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "PartsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def from_bytes(data: bytes, media_type: str) -> BlobParts:
    """Return `data` as a blob."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return BlobParts(Descriptor(media_type, digest, len(data)), (BlobPart(len(data), data=data),))


def from_parts(parts: Sequence[BlobPart], media_type: str) -> BlobParts:
    """Return `parts` as a blob, reading them once for the digest."""
    sha, size = hashlib.sha256(), 0
    with PartsReader(parts) as reader:
        while chunk := reader.read():
            sha.update(chunk)
            size += len(chunk)
    return BlobParts(Descriptor(media_type, f"sha256:{sha.hexdigest()}", size), tuple(parts))


def from_file(path: Path, descriptor: Descriptor) -> BlobParts:
    """Return the file at `path`, known to match `descriptor`, as a blob."""
    return BlobParts(descriptor, (BlobPart(descriptor.size, path=path),))


def is_digest(text: object) -> bool:
    """Whether `text` is `sha256:` and 64 lower-case hex digits, so safe to be a file's name too."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def file_digest(path: Path) -> str:
    """Return `sha256:…` of the file at `path`."""
    return f"sha256:{sha256(path)}"


def read_all(reader: Reader) -> Iterator[bytes]:
    """Yield the bytes of `reader` in chunks and close it."""
    try:
        while chunk := reader.read(READ_BYTES):
            yield chunk
    finally:
        reader.close()
