"""What is attached to an image: artifacts that name it as their `subject` (OCI 1.1), found by its digest.

A registry with the referrers API lists them itself; for one without, and in a layout, an index under the tag
`sha256-X` does (the specification's fallback). Knows manifests as JSON, not where they are kept.
Start at `artifact` and `Referrer`.
"""

import json
from dataclasses import dataclass
from typing import Any

from runtime.errors import RegistryError
from runtime.oci import manifests
from runtime.oci.blobs import Blob, Descriptor, from_bytes, is_digest
from runtime.oci.image import INDEX, MANIFEST, Image, assemble
from runtime.oci.store import StoredManifest

MOST = 1000
"""Referrers of one image that are read."""


@dataclass(frozen=True, slots=True)
class Referrer:
    """An artifact about an image, as a list of them states it."""

    manifest: Descriptor
    artifact_type: str

    def as_json(self) -> dict[str, Any]:
        """Return this as an entry of an index."""
        return self.manifest.as_json() | {"artifactType": self.artifact_type}


def artifact(blob: Blob, *, kind: str, subject: Descriptor, annotations: dict[str, str]) -> Image:
    """Return the artifact of type `kind` that holds `blob` and is about `subject`."""
    empty = from_bytes(b"{}", manifests.EMPTY)
    return assemble([blob], empty, annotations=annotations, artifact_type=kind, subject=subject)


def of(manifest: StoredManifest) -> Referrer:
    """Return how a list names the artifact `manifest`."""
    document = manifest.document
    kind = document.get("artifactType") or document["config"]["mediaType"]
    notes = document.get("annotations") or {}
    return Referrer(Descriptor(manifest.media_type, manifest.digest, len(manifest.data), notes), kind)


def fallback_tag(digest: str) -> str:
    """Return the tag of the index of an image's referrers, where a registry keeps none itself."""
    return digest.replace(":", "-")


def read(index: StoredManifest | None, where: str) -> list[Referrer]:
    """Return what an index of referrers lists; RegistryError when it is none, or lists too many."""
    if index is None:
        return []
    try:
        entries = index.document["manifests"]
        found = [_referrer(entry) for entry in entries[: MOST + 1]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RegistryError(f"{where}: no index of referrers; delete it, and push again") from None
    if len(found) > MOST:
        raise RegistryError(f"{where}: more than {MOST} referrers; refused")
    return found


def with_one_more(index: StoredManifest | None, referrer: Referrer, where: str) -> StoredManifest | None:
    """Return the index with `referrer`; None where it is listed already."""
    found = read(index, where)
    if any(each.manifest.digest == referrer.manifest.digest for each in found):
        return None
    entries = [each.as_json() for each in (*found, referrer)]
    document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}
    return StoredManifest(json.dumps(document, separators=(",", ":")).encode(), INDEX)


def _referrer(entry: dict[str, Any]) -> Referrer:
    digest, size = entry["digest"], entry["size"]
    if not is_digest(digest) or type(size) is not int:
        raise ValueError(digest)
    notes = {str(key): str(value) for key, value in (entry.get("annotations") or {}).items()}
    kind = str(entry.get("artifactType") or "")
    return Referrer(Descriptor(str(entry.get("mediaType") or MANIFEST), digest, size, notes), kind)
