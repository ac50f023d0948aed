"""Builds images: a folder's files under /data, reproducible byte for byte, with a complete image config.

The same files and annotations give the same digest: entries are sorted, owners, times and modes are
fixed. Weights go into plain tar layers (they hardly compress: 500 MB cost gzip 26 s and save
nothing), compressible files into one gzip layer. Does not know where images go. Start at `build`.
"""

import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.errors import ConfigError
from runtime.files import disk_errors
from runtime.logs import printable
from runtime.oci.blobs import (
    Blob,
    BlobPart,
    BlobParts,
    Descriptor,
    PartsReader,
    file_digest,
    from_bytes,
    from_file,
    from_parts,
)
from runtime.oci.listing import list_files

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"

_EPOCH = "1970-01-01T00:00:00Z"
_MAX_RATIO = 0.9
"""Compress a file when a sample of it shrinks to less than this ratio."""
_SAMPLE_BYTES = 1 << 18
_SMALL_BYTES = 1 << 16
"""Files below this size are compressed without a sample."""
_OWN_LAYER_BYTES = 64 << 20
"""Files from this size on get a layer of their own, so that they are uploaded in parallel."""
_MAX_OWN_LAYERS = 32


@dataclass(frozen=True, slots=True)
class BaseImage:
    """An image to put the files on: its config and the blobs of its layers."""

    config: dict[str, Any]
    layers: tuple[Blob, ...]
    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class Image:
    """A manifest and every blob it names; the config is the last of `blobs`."""

    manifest: bytes
    blobs: tuple[Blob, ...]
    media_type: str = MANIFEST

    @property
    def digest(self) -> str:
        """Digest of the manifest: the image's name by content."""
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(blob.descriptor.size for blob in self.blobs)


def build(
    folder: Path,
    scratch: Path,
    *,
    files: Sequence[str] | None = None,
    annotations: Mapping[str, str] = {},
    base: BaseImage | None = None,
) -> Image:
    """Return the image of `folder`.

    scratch: directory for the compressed layer, to be kept until the image is pushed.
    files: paths relative to `folder`; all regular files below it when None.
    """
    names = list_files(folder, files)
    layers: list[Blob] = list(base.layers) if base else []
    diff_ids: list[str] = list(base.config["rootfs"]["diff_ids"]) if base else []
    packed, plain = _groups(folder, names)
    if packed:
        layer, diff_id = _gzip_layer(folder, packed, scratch)
        layers.append(layer)
        diff_ids.append(diff_id)
    for group in plain:
        layer = from_parts(list(tar_parts(folder, group)), LAYER_TAR)
        layers.append(layer)
        diff_ids.append(layer.descriptor.digest)
    config = from_bytes(_encode(_config(diff_ids, base)), CONFIG)
    notes = dict(annotations)
    if base:
        notes |= {
            "org.opencontainers.image.base.name": base.name,
            "org.opencontainers.image.base.digest": base.digest,
        }
    return assemble(layers, config, annotations=notes)


def assemble(
    layers: Sequence[Blob],
    config: Blob,
    *,
    annotations: Mapping[str, str],
    artifact_type: str | None = None,
    subject: Descriptor | None = None,
) -> Image:
    """Return the image with these blobs; ConfigError for annotations that a reader could not show.

    subject: the image that an artifact is about.
    """
    _check_annotations(annotations)
    manifest: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST}
    if artifact_type:
        manifest["artifactType"] = artifact_type
    manifest["config"] = config.descriptor.as_json()
    manifest["layers"] = [layer.descriptor.as_json() for layer in layers]
    if subject:
        manifest["subject"] = subject.as_json()
    if annotations:
        manifest["annotations"] = dict(sorted(annotations.items()))
    return Image(_encode(manifest), (*layers, config))


def _check_annotations(annotations: Mapping[str, str]) -> None:
    for key, value in annotations.items():
        if not key.strip() or printable(key) != key or "\n" in key or "\t" in key:
            raise ConfigError(f"annotation {key!r}: expected a key in printable characters, such as a.b/c")
        if printable(value) != value:
            raise ConfigError(
                f"annotation {key}: {value[:80]!r} holds characters that cannot be shown, expected text"
            )


def tar_parts(folder: Path, names: Iterable[str], root: str = "data") -> Iterable[BlobPart]:
    """Yield a tar archive of `names` under `root`/ as parts, files unread."""
    made: set[str] = set()
    size = 0
    for name in names:
        target = PurePosixPath(root, name)
        for parent in reversed(target.parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                header = _header(f"{parent}/", 0, folder=True)
                size += len(header)
                yield BlobPart(len(header), data=header)
        path = folder / name
        length = path.stat().st_size
        header = _header(str(target), length)
        yield BlobPart(len(header), data=header)
        if length:
            yield BlobPart(length, path=path)
        padding = -length % tarfile.BLOCKSIZE
        if padding:
            yield BlobPart(padding, data=bytes(padding))
        size += len(header) + length + padding
    end = 2 * tarfile.BLOCKSIZE
    end += -(size + end) % tarfile.RECORDSIZE
    yield BlobPart(end, data=bytes(end))


def _header(name: str, size: int, *, folder: bool = False) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uid, info.gid = size, 0, 0, 0
    info.type, info.mode = (tarfile.DIRTYPE, 0o755) if folder else (tarfile.REGTYPE, 0o644)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _groups(folder: Path, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Split `names` into those worth compressing and layers of those that are not."""
    packed: list[str] = []
    rest: list[str] = []
    alone: list[list[str]] = []
    for name in names:
        path = folder / name
        if _compresses(path):
            packed.append(name)
        elif path.stat().st_size >= _OWN_LAYER_BYTES and len(alone) < _MAX_OWN_LAYERS:
            alone.append([name])
        else:
            rest.append(name)
    return packed, ([rest] if rest else []) + alone


def _compresses(path: Path) -> bool:
    size = path.stat().st_size
    if size < _SMALL_BYTES:
        return True
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
        if size > 3 * _SAMPLE_BYTES:  # a safetensors header compresses, the tensors behind it do not
            for offset in (size // 2, size - _SAMPLE_BYTES):
                file.seek(offset)
                sample += file.read(_SAMPLE_BYTES)
    return len(zlib.compress(sample, 1)) < _MAX_RATIO * len(sample)


def _gzip_layer(folder: Path, names: Sequence[str], scratch: Path) -> tuple[BlobParts, str]:
    path = scratch / "layer.tar.gz"
    plain = hashlib.sha256()
    with (
        disk_errors(scratch),
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
        PartsReader(list(tar_parts(folder, names))) as reader,
    ):
        while chunk := reader.read():
            plain.update(chunk)
            packed.write(chunk)
    layer = Descriptor(LAYER_GZIP, file_digest(path), path.stat().st_size)
    return from_file(path, layer), f"sha256:{plain.hexdigest()}"


def _config(diff_ids: list[str], base: BaseImage | None) -> dict[str, Any]:
    # An image must name an architecture; these files depend on none, so the commonest is taken.
    config: dict[str, Any] = {"architecture": "amd64", "os": "linux", "config": {}}
    config |= base.config if base else {}
    kept = len(base.layers) if base else 0
    step = {"created": _EPOCH, "created_by": "runtime push", "comment": "files under /data"}
    config["created"] = _EPOCH
    config["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    below = config.get("history")
    config["history"] = [*(below if isinstance(below, list) else []), *([step] * (len(diff_ids) - kept))]
    return config


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
