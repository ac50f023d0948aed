"""Unpacks the downloaded layers of an untrusted image: first all names, then the bytes that are wanted.

A first pass reads every layer into a tree in memory (tree.py) and checks it whole; only then is anything
written, into a folder of its own, at the offsets that the tree knows. So whiteouts, links, limits and the
free disk are decided before the first byte, and no link exists on disk while files are written. Knows no
manifests. Start at `read_layer` and `write`.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import CapacityError, ConfigError, RegistryError
from runtime.files import disk_errors
from runtime.oci.blobs import READ_BYTES
from runtime.oci.decompression import PlainStream, opened, unpacked_limit
from runtime.oci.selection import Selection
from runtime.oci.tar import entries
from runtime.oci.tree import ImageTree, TreeFile, shown


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A downloaded and verified blob."""

    path: Path
    digest: str
    diff_id: str | None = None
    """Digest that its unpacked bytes must have."""
    is_archive: bool = True
    """False for a file that is a layer by itself."""


def read_layer(tree: ImageTree, blob: LayerBlob, number: int, *, whiteouts: bool = True) -> None:
    """Apply a layer to `tree`; RegistryError when it is unsafe, damaged or unpacks to another `diff_id`.

    number: its place among the image's layers, as the tree's files name it.
    """
    with opened(blob.path, blob.digest) as stream:
        for entry in entries(stream):
            tree.apply(entry, number, whiteouts=whiteouts)
        if blob.diff_id is not None and stream.digest() != blob.diff_id:
            raise RegistryError(
                f"layer {blob.digest}: unpacks to {stream.digest()}, the image says {blob.diff_id}"
            )


def write(selection: Selection, blobs: Sequence[LayerBlob], target: Path) -> None:
    """Write the selected files, folders and links into the empty folder `target`.

    Raises CapacityError when the disk has no room for them, RegistryError when they are out of proportion
    to the image.
    """
    _check_size(selection, blobs, target)
    with disk_errors(target, selection.size), _names_refused(target):
        for folder in selection.folders:
            (target / folder).mkdir(parents=True)
        wanted: dict[int, dict[int, list[tuple[str, TreeFile]]]] = {}
        for name, file in selection.files:
            wanted.setdefault(file.source, {}).setdefault(file.offset, []).append((name, file))
        for number, by_offset in wanted.items():
            blob = blobs[number]
            if blob.is_archive:
                _write_from(blob, by_offset, target)
            else:
                for name, _ in by_offset[0]:
                    _place(blob.path, target / name)
        for name, leads_to in selection.links:
            (target / name).symlink_to(leads_to)


@contextmanager
def _names_refused(target: Path) -> Iterator[None]:
    """Name a path that this file system does not take: some know no colons, some no second case."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EEXIST}:
            raise
        raise ConfigError(
            f"{shown(str(error.filename))}: not possible on the file system of {target} ({error.strerror});"
            " pull into another one"
        ) from None


def _check_size(selection: Selection, blobs: Sequence[LayerBlob], target: Path) -> None:
    limit = unpacked_limit(sum(blob.path.stat().st_size for blob in blobs))
    if selection.size > limit:
        raise RegistryError(
            f"layers unpack to {selection.size} bytes of files, more than {limit}; refused as a bomb"
        )
    free = shutil.disk_usage(target).free
    if selection.size > free:
        raise CapacityError(
            f"{target}: the files take {selection.size} bytes and {free} are free;"
            " free space or use another disk"
        )


def _write_from(blob: LayerBlob, by_offset: dict[int, list[tuple[str, TreeFile]]], target: Path) -> None:
    """Write files of one layer in the order in which they lie in it."""
    with opened(blob.path, blob.digest) as stream:
        for offset in sorted(by_offset):
            (name, file), *further = by_offset[offset]
            stream.skip_to(offset)
            _copy(stream, file, target / name)
            for other, _ in further:
                shutil.copy(target / name, target / other)


def _copy(stream: PlainStream, file: TreeFile, path: Path) -> None:
    left = file.size
    with path.open("xb") as written:
        while left:
            chunk = stream.read(min(left, READ_BYTES))
            if not chunk:
                raise RegistryError(f"{path.name}: its layer changed while it was read; pull again")
            written.write(chunk)
            left -= len(chunk)
    path.chmod(0o755 if file.executable else 0o644)


def _place(blob: Path, path: Path) -> None:
    try:
        path.hardlink_to(blob)
    except OSError:  # the cache may be another file system
        shutil.copyfile(blob, path)
