"""Builds CNCF ModelPack artifacts, which hold each file as a layer of its own.

Does not know where they are pushed. Start at `build`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.oci.blobs import Blob, BlobPart, BlobParts, Descriptor, from_bytes, from_parts
from runtime.oci.contents import FILE_PATH
from runtime.oci.image import Image, assemble
from runtime.oci.listing import list_files

_CNCF = "application/vnd.cncf.model."
_TYPES = {
    ".safetensors": "weight.v1.raw",
    ".bin": "weight.v1.raw",
    ".gguf": "weight.v1.raw",
    ".md": "doc.v1.raw",
    ".html": "doc.v1.raw",
    ".txt": "doc.v1.raw",
}


def build(folder: Path, *, files: Sequence[str] | None = None, annotations: Mapping[str, str] = {}) -> Image:
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
