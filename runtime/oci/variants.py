"""Other forms of image than the plain one: files on a base image, and CNCF ModelPack artifacts.

A base with a shell (busybox) serves old controllers, which run `cp -r /data/*` inside the image.
Start at `load_base` and `modelpack`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.oci.access import Access
from runtime.oci.blobs import Blob, BlobPart, BlobParts, Descriptor, from_bytes, from_file, from_parts
from runtime.oci.contents import FILE_PATH
from runtime.oci.image import Base, Image, assemble, list_files
from runtime.oci.images import download
from runtime.oci.reference import Reference

_CNCF = "application/vnd.cncf.model."
_TYPES = {
    ".safetensors": "weight.v1.raw",
    ".bin": "weight.v1.raw",
    ".gguf": "weight.v1.raw",
    ".md": "doc.v1.raw",
    ".html": "doc.v1.raw",
    ".txt": "doc.v1.raw",
}


def load_base(reference: Reference, scratch: Path, access: Access) -> Base:
    """Return the base image, its layers downloaded to `scratch` as they are stored."""
    info, blobs = download(reference, scratch, access)
    if info.contents.kind != "image":
        raise ConfigError(f"{reference}: an artifact, expected an image to put files on")
    config: dict[str, Any] = json.loads(blobs[-1].read_bytes())
    if len(config.get("rootfs", {}).get("diff_ids", [])) != len(info.contents.layers):
        raise ConfigError(f"{reference}: its configuration names no diff_ids; choose another base image")
    layers = [
        from_file(path, Descriptor(_oci_type(layer.media_type), layer.digest, layer.size))
        for layer, path in zip(info.contents.layers, blobs, strict=False)
    ]
    return Base(config, tuple(layers), str(reference), info.digest)


def modelpack(
    folder: Path, *, files: Sequence[str] | None = None, annotations: Mapping[str, str] = {}
) -> Image:
    """Return the files of `folder` as a ModelPack artifact: one raw layer each (CNCF model-spec v0.0.7)."""
    layers: list[Blob] = []
    for name in list_files(folder, files):
        path = folder / name
        size = path.stat().st_size
        kind = _CNCF + _TYPES.get(path.suffix, "weight.config.v1.raw")
        blob = from_parts([BlobPart(size, path=path)] if size else [], kind)
        note = {FILE_PATH: name}
        layers.append(BlobParts(Descriptor(kind, blob.descriptor.digest, size, note), blob.parts))
    diff_ids = [layer.descriptor.digest for layer in layers]
    config = {
        "descriptor": {"name": annotations.get("org.opencontainers.image.title", folder.name)},
        "modelfs": {"type": "layers", "diffIds": diff_ids},
        "config": {"format": "safetensors"},
    }
    described = from_bytes(json.dumps(config, separators=(",", ":")).encode(), f"{_CNCF}config.v1+json")
    return assemble(layers, described, annotations=annotations, artifact_type=f"{_CNCF}manifest.v1+json")


def _oci_type(media_type: str) -> str:
    """Name a Docker layer's type as OCI does: one manifest holds one kind."""
    docker = "application/vnd.docker.image.rootfs.diff.tar"
    return media_type.replace(docker, "application/vnd.oci.image.layer.v1.tar").replace(
        "tar.gzip", "tar+gzip"
    )
