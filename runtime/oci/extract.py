"""Unpacks untrusted layers: nothing is written outside the target, and no archive bomb fills the disk.

Refuses absolute names, `..`, links that lead out, devices and pipes, and archives that grow out of
proportion. Knows tar, gzip and zstd, not manifests. Start at `Unpacker`.
"""

import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from runtime.errors import CapacityError, RegistryError
from runtime.files import disk_errors
from runtime.oci.blobs import READ_BYTES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAX_RATIO = 100
"""Refuse an archive that unpacks to more than this many times its compressed size (weights: about 1.1)"""
_ALWAYS_ALLOWED_BYTES = 256 << 20
"""… unless it stays below this size."""
_MAX_ENTRIES = 100_000
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class Unpacker:
    """Unpacks archives on top of each other into one directory, keeping only the entries under `root`/.

    root: "data" keeps `data/x` as `x` and drops the rest, "" keeps everything.
    """

    def __init__(self, target: Path, *, root: str = ""):
        self._target = Path(os.path.realpath(target))
        self._root = PurePosixPath(root)
        self._entries = 0
        self.found = False
        """Whether any entry under `root` was seen."""

    def unpack(self, archive: Path, *, diff_id: str | None = None) -> None:
        """Unpack a tar archive, compressed or plain; RegistryError when unsafe, damaged or not `diff_id`."""
        limit = max(_ALWAYS_ALLOWED_BYTES, _MAX_RATIO * archive.stat().st_size)
        try:
            with disk_errors(self._target), _decompressed(archive) as stream:
                counted = _LimitedReader(stream, limit, archive.name)
                with tarfile.open(
                    fileobj=cast("BinaryIO", counted), mode="r|", bufsize=READ_BYTES
                ) as entries:
                    for entry in entries:
                        self._extract(entries, entry)
                        entries.members = []  # type: ignore[attr-defined]  # else it keeps every entry
                while counted.read(READ_BYTES):
                    pass
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
            raise RegistryError(f"layer {archive.name}: not a readable tar archive ({error})") from None
        if diff_id and counted.digest != diff_id:
            raise RegistryError(
                f"layer {archive.name}: unpacks to {counted.digest}, the image says {diff_id}"
            )

    def finish(self) -> None:
        """Check that every link still leads to a path inside the target after the last layer."""
        for folder, folders, files in os.walk(self._target):
            for name in (*folders, *files):
                path = Path(folder, name)
                if path.is_symlink() and not self._inside(path):
                    raise RegistryError(f"layer entry {name!r}: a link that leads out of the image; refused")

    def _extract(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        self._entries += 1
        if self._entries > _MAX_ENTRIES:
            raise RegistryError(f"layers hold more than {_MAX_ENTRIES} entries; refused as a bomb")
        relative = self._relative(entry.name)
        if relative is None:
            return
        self.found = True
        path = self._target / relative
        if relative.name.startswith(_WHITEOUT):
            self._remove(path)
            return
        if relative == PurePosixPath("."):
            return
        if not self._inside(path.parent):
            raise RegistryError(f"layer entry {entry.name!r}: would be written outside the image; refused")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not (path.is_dir() and entry.isdir())):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if entry.isdir():
            path.mkdir(exist_ok=True)
        elif entry.isreg():
            self._write(archive, entry, path)
        elif entry.issym():
            self._link(entry, path, Path(path.parent, entry.linkname))
        elif entry.islnk():
            self._copy(entry, path)
        else:
            raise RegistryError(
                f"layer entry {entry.name!r}: a device or pipe; only files, folders and links are taken"
            )

    def _relative(self, name: str) -> PurePosixPath | None:
        """Return the path below the target, None when it is outside `root`."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise RegistryError(f"layer entry {name!r}: an absolute path or '..'; refused")
        return path.relative_to(self._root) if path.is_relative_to(self._root) else None

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._target)

    def _write(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
        source = cast("BinaryIO", archive.extractfile(entry))  # None only for what is no file
        with path.open("xb") as file:
            shutil.copyfileobj(source, file, READ_BYTES)
        path.chmod(0o755 if entry.mode & 0o111 else 0o644)

    def _link(self, entry: tarfile.TarInfo, path: Path, leads_to: Path) -> None:
        if PurePosixPath(entry.linkname).is_absolute() or not self._inside(leads_to):
            raise RegistryError(
                f"layer entry {entry.name!r}: a link to {entry.linkname!r}, out of the image; refused"
            )
        path.symlink_to(entry.linkname)

    def _copy(self, entry: tarfile.TarInfo, path: Path) -> None:
        """Write a hard link as a copy of its file."""
        relative = self._relative(entry.linkname)
        source = self._target / relative if relative is not None else None
        if source is None or not self._inside(source) or not source.is_file():
            raise RegistryError(
                f"layer entry {entry.name!r}: a link to {entry.linkname!r}, not in the image; refused"
            )
        shutil.copyfile(source, path)

    def _remove(self, path: Path) -> None:
        """Apply a whiteout: hide what lower layers put there."""
        opaque = path.name == _OPAQUE
        hidden = path.parent if opaque else path.parent / path.name.removeprefix(_WHITEOUT)
        if hidden.name in ("", ".", "..") or not self._inside(hidden.parent):
            raise RegistryError(f"layer entry {path.name!r}: would remove files outside the image; refused")
        for entry in sorted(hidden.iterdir()) if opaque and hidden.is_dir() else [hidden]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


class _LimitedReader:
    """Hashes the bytes read, and raises CapacityError after more than `limit` of them."""

    def __init__(self, stream: Any, limit: int, name: str):
        self._stream, self._limit, self._name = stream, limit, name
        self._sha = hashlib.sha256()
        self._bytes = self._padded = 0

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha.hexdigest()}"

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        if not data:  # some writers (umoci) leave the last block unfilled; every reader but Python's takes it
            padding = bytes(min(size, -(self._bytes + self._padded) % tarfile.BLOCKSIZE))
            self._padded += len(padding)
            return padding
        self._bytes += len(data)
        if self._bytes > self._limit:
            raise CapacityError(
                f"layer {self._name}: unpacks to more than {self._limit} bytes, {_MAX_RATIO} times its size;"
                " refused as a bomb"
            )
        self._sha.update(data)
        return data


@contextmanager
def _decompressed(archive: Path) -> Iterator[Any]:
    with archive.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        elif magic == b"\x28\xb5\x2f\xfd":
            with zstd.ZstdFile(file) as unpacked:
                yield unpacked
        else:
            yield file
