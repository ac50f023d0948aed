"""Reads manifests and indexes: what an image or artifact consists of, as far as it is used here.

Three kinds are read: images with the files under /data (ours, and the controller's old and new form),
artifacts as `oras push` makes them (titles, unpacked folders), and CNCF ModelPack artifacts. Knows manifests
as JSON, not where they come from; contents.py lays their layers out as files. Start at `read`.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.errors import RegistryError
from runtime.oci.blobs import Descriptor, is_digest
from runtime.oci.image import CONFIG, INDEX
from runtime.oci.store import StoredManifest

log = logging.getLogger(__name__)

Kind = Literal["image", "artifact", "modelpack"]

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
"""Type of the placeholder blob of artifacts without a configuration or without files."""
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"
_MODELPACK = "application/vnd.cncf.model."
_MAX_CONFIG_BYTES = 4 << 20
_MAX_LAYERS = 500
"""As many as Linux lays over each other."""
_ATTESTATION = "attestation-manifest"


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
    """Return what `manifest` holds; RegistryError when it is no image or artifact manifest that is taken."""
    document = _document(manifest, where)
    try:
        entries = [document["config"], *document["layers"]]
        config, *layers = (_descriptor(entry) for entry in entries)
        annotations = _strings(document.get("annotations"))
        artifact_type = str(document.get("artifactType") or config.media_type)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = f": {error}" if isinstance(error, ValueError) else ""
        raise RegistryError(
            f"{where}: not an image manifest ({manifest.media_type}{said}); expected one of OCI or Docker"
        ) from None
    kind: Kind = "artifact"
    if artifact_type.startswith(_MODELPACK) or config.media_type.startswith(_MODELPACK):
        kind = "modelpack"
    elif config.media_type in {CONFIG, DOCKER_CONFIG}:
        kind = "image"
    found = ImageManifest(kind, config, tuple(layers), annotations)
    _check(found, entries[1:], where)
    return found


def choose_platform(index: StoredManifest, machine: str, where: str) -> str:
    """Return the digest of the manifest for this machine in an index of several, else of the first.

    Files under /data are the same on every machine, so any image is better than none; it is logged.
    """
    try:
        entries = [e for e in _document(index, where)["manifests"] if _is_image(e)]
        platforms = [_platform(entry) for entry in entries]
        digests = [str(entry["digest"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RegistryError(
            f"{where}: not an image index; expected manifests with digest and platform"
        ) from None
    if not digests:
        raise RegistryError(f"{where}: an image index without an image for linux/{machine}, or any other")
    wanted = f"linux/{machine}"
    for platform in (wanted, ""):
        if platform in platforms:
            return digests[platforms.index(platform)]
    log.warning("%s: has no image for %s, taking that for %s", where, wanted, platforms[0])
    return digests[0]


def is_index(manifest: StoredManifest) -> bool:
    """Whether `manifest` lists manifests; by what it holds where it has no type."""
    if manifest.media_type in {INDEX, DOCKER_LIST}:
        return True
    document = manifest.document
    return "manifests" in document and not {"config", "layers"} & document.keys()


def diff_ids(config: Path, where: str) -> list[str]:
    """Return the digests that an image's layers must have when unpacked; [] where it states none."""
    try:
        document = json.loads(config.read_bytes())
        stated = (document.get("rootfs") or {}).get("diff_ids") or []
        if not isinstance(stated, list) or not all(isinstance(entry, str) for entry in stated):
            raise TypeError(stated)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise RegistryError(
            f"{where}: its configuration is no image configuration; push the image again"
        ) from None
    return stated


def _document(manifest: StoredManifest, where: str) -> dict[str, Any]:
    """Return the JSON of a manifest or index; RegistryError for what is neither, or both."""
    document = manifest.document
    if not document:
        raise RegistryError(
            f"{where}: not an image manifest ({manifest.media_type}); expected one of OCI or Docker"
        )
    if manifest.media_type.startswith(_SCHEMA_1) or document.get("schemaVersion") == 1:
        raise RegistryError(
            f"{where}: a manifest of Docker's schema 1, which no tool writes any more; push the image again"
        )
    if "manifests" in document and {"config", "layers"} & document.keys():
        raise RegistryError(f"{where}: a manifest and an index at once; refused")  # CVE-2021-41190
    return document


def _check(manifest: ImageManifest, entries: list[dict[str, Any]], where: str) -> None:
    """Raise RegistryError for a manifest whose blobs are not to be downloaded."""
    if manifest.config.size > _MAX_CONFIG_BYTES:
        raise RegistryError(
            f"{where}: image configuration of {manifest.config.size} bytes; expected at most 4 MiB"
        )
    if len(manifest.layers) > _MAX_LAYERS:
        raise RegistryError(f"{where}: {len(manifest.layers)} layers; expected at most {_MAX_LAYERS}")
    for layer, entry in zip(manifest.layers, entries, strict=True):
        if entry.get("urls"):
            raise RegistryError(
                f"{where}: layer {layer.digest} is a foreign one, kept outside the registry;"
                " push the image with it"
            )
        if layer.media_type.endswith("+encrypted"):
            raise RegistryError(
                f"{where}: layer {layer.digest} is encrypted; push the image without encryption"
            )


def _descriptor(entry: dict[str, Any]) -> Descriptor:
    digest, size, media_type = entry["digest"], entry["size"], entry.get("mediaType") or ""
    if not is_digest(digest):
        raise ValueError(f"digest {str(digest)[:80]!r}, expected sha256: and 64 hex digits")
    if type(size) is not int or size < 0 or not isinstance(media_type, str):
        raise ValueError(f"size {str(size)[:20]} of {digest}")
    return Descriptor(media_type, digest, size, _strings(entry.get("annotations")))


def _strings(annotations: Any) -> dict[str, str]:
    if not isinstance(annotations or {}, dict):
        raise TypeError(annotations)
    return {str(key): str(value) for key, value in (annotations or {}).items()}


def _is_image(entry: dict[str, Any]) -> bool:
    kind = (entry.get("annotations") or {}).get("vnd.docker.reference.type")
    return kind != _ATTESTATION and _platform(entry) != "unknown/unknown"


def _platform(entry: dict[str, Any]) -> str:
    """Return `os/architecture` of an index entry, "" where it names none."""
    platform = entry.get("platform") or {}
    if not platform.get("os") and not platform.get("architecture"):
        return ""
    return f"{platform.get('os')}/{platform.get('architecture')}"
