"""Reads manifests, and lays their layers out as a folder.

Three kinds are read: images with the files under /data (ours, and the controller's old and new form),
artifacts as `oras push` makes them (titles, unpacked folders), and CNCF ModelPack artifacts.
Knows manifests as JSON, not where they come from. Start at `read`.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from runtime.errors import RegistryError
from runtime.oci.blobs import Descriptor
from runtime.oci.extract import Unpacker
from runtime.oci.image import CONFIG, INDEX, LAYER_GZIP
from runtime.oci.store import StoredManifest

Kind = Literal["image", "artifact", "modelpack"]

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
FILE_PATH = "org.cncf.model.filepath"
_MODELPACK = "application/vnd.cncf.model."
_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """The manifest of an image or artifact, as far as it is used here."""

    kind: Kind
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all layers as stored."""
        return sum(layer.size for layer in self.layers)


def read(manifest: StoredManifest, where: str) -> ImageManifest:
    """Return what `manifest` holds; RegistryError when it is not an image or artifact manifest."""
    try:
        document = json.loads(manifest.data)
        config = _descriptor(document["config"])
        layers = tuple(_descriptor(entry) for entry in document["layers"])
        annotations = dict(document.get("annotations") or {})
        artifact_type = str(document.get("artifactType") or config.media_type)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RegistryError(
            f"{where}: not an image manifest ({manifest.media_type}); expected one of OCI or Docker"
        ) from None
    kind: Kind = "artifact"
    if artifact_type.startswith(_MODELPACK) or config.media_type.startswith(_MODELPACK):
        kind = "modelpack"
    elif config.media_type in {CONFIG, DOCKER_CONFIG}:
        kind = "image"
    return ImageManifest(kind, config, layers, annotations)


def choose_platform(index: StoredManifest, machine: str, where: str) -> str:
    """Return the digest of the manifest for this machine in an index of several, else of the first."""
    try:
        entries = [e for e in json.loads(index.data)["manifests"] if _is_image(e)]
        for entry in entries:
            platform = entry.get("platform") or {}
            if platform.get("os") == "linux" and platform.get("architecture") == machine:
                return str(entry["digest"])
        return str(entries[0]["digest"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise RegistryError(f"{where}: an image index without an image for linux/{machine}") from None


def is_index(manifest: StoredManifest) -> bool:
    """Whether `manifest` lists manifests."""
    return manifest.media_type in {INDEX, DOCKER_LIST}


def diff_ids(config: Path, where: str) -> list[str]:
    """Return the digests that an image's layers must have when unpacked ([] without any)."""
    size = config.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        raise RegistryError(f"{where}: image configuration of {size} bytes; expected at most 4 MiB")
    try:
        return [str(entry) for entry in json.loads(config.read_bytes())["rootfs"]["diff_ids"]]
    except (ValueError, KeyError, TypeError):
        return []


def unpack(
    manifest: ImageManifest, blobs: list[Path], target: Path, *, diff_ids: list[str], where: str
) -> None:
    """Turn the downloaded `blobs` of the layers into files in the empty folder `target`."""
    if manifest.kind == "image":
        if diff_ids and len(diff_ids) != len(blobs):
            raise RegistryError(
                f"{where}: {len(blobs)} layers but {len(diff_ids)} diff_ids; the image is malformed"
            )
        unpacker = Unpacker(target, root="data")
        for number, blob in enumerate(blobs):
            unpacker.unpack(blob, diff_id=diff_ids[number] if diff_ids else None)
        unpacker.finish()
        if not unpacker.found:
            raise RegistryError(
                f"{where}: the image holds no /data; expected adapter, dataset or weight files there"
            )
        return
    unpacker = Unpacker(target)
    for layer, blob in zip(manifest.layers, blobs, strict=True):
        name = layer.annotations.get(FILE_PATH) or layer.annotations.get(TITLE)
        if _is_folder(manifest.kind, layer, name or ""):
            unpacker.unpack(blob)
        elif name:
            _place(blob, target, name, where)
        else:
            raise RegistryError(
                f"{where}: layer {layer.digest} has no title, so no file name; push it with one"
            )
    unpacker.finish()
    _lift(target)


def _is_folder(kind: Kind, layer: Descriptor, name: str) -> bool:
    """Whether a layer of an artifact is a packed folder: Go's oras annotates it, oras-py sets the type."""
    if kind == "modelpack":
        return ".tar" in layer.media_type
    packed = layer.media_type == LAYER_GZIP and not name.endswith((".tar", ".gz", ".tgz"))
    return packed or layer.annotations.get(UNPACK) == "true"


def _place(blob: Path, target: Path, name: str, where: str) -> None:
    relative = PurePosixPath(name)
    inside = (target / relative).resolve().is_relative_to(target.resolve())
    if relative.is_absolute() or ".." in relative.parts or relative.name == "" or not inside:
        raise RegistryError(f"{where}: layer title {name!r} leads out of the folder; refused")
    path = target / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(blob)
    except OSError:  # the cache may be another file system
        shutil.copyfile(blob, path)


def _lift(target: Path) -> None:
    """Move the content of a lone folder up into `target`: `oras push adapter/` means the folder's content."""
    entries = list(target.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        emptied = target / f".lift-{entries[0].name}"  # one of its entries may have its own name
        entries[0].rename(emptied)
        for entry in emptied.iterdir():
            entry.rename(target / entry.name)
        emptied.rmdir()


def _descriptor(entry: dict[str, Any]) -> Descriptor:
    digest, size = str(entry["digest"]), int(entry["size"])
    hexadecimal = digest.removeprefix("sha256:")
    if len(hexadecimal) != 64 or set(hexadecimal) - set("0123456789abcdef") or size < 0:
        raise ValueError(digest)
    return Descriptor(str(entry["mediaType"]), digest, size, dict(entry.get("annotations") or {}))


def _is_image(entry: dict[str, Any]) -> bool:
    kind = (entry.get("annotations") or {}).get("vnd.docker.reference.type")
    return kind != "attestation-manifest"
