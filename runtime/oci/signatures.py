"""Signatures of images, in cosign's simple-signing form: made, read, and required before a pull.

The signatures of the image sha256:X are the layers of another image, tagged `sha256-X.sig`: each a payload
that names repository and digest, with the signature as an annotation. `cosign verify`, skopeo and podman read
them (https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md). No transparency log, no
certificates: who holds the key has signed. Start at `sign` and `require`.
"""

import base64
import binascii
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import ConfigError, RegistryError
from runtime.logs import counted
from runtime.oci import manifests
from runtime.oci.blobs import Descriptor, from_bytes
from runtime.oci.image import CONFIG, MANIFEST
from runtime.oci.keys import SigningKey, VerificationKey
from runtime.oci.reference import Reference, parse
from runtime.oci.store import Store, StoredManifest, unreported

log = logging.getLogger(__name__)

PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
KIND = "cosign container image signature"
MOST_SIGNATURES = 64
"""Of one image; those beyond are an error, not work."""
_MOST_PAYLOAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ImageSignature:
    """One signature as it is stored, by whomever."""

    payload: bytes
    signature: bytes
    """DER; b"" where the annotation is none."""
    layer: Descriptor

    def signer(self, keys: Sequence[VerificationKey]) -> VerificationKey | None:
        """Return the one of `keys` that has signed the payload, whatever that says."""
        return next((key for key in keys if key.verifies(self.payload, self.signature)), None)

    def fault(self, reference: Reference, digest: str) -> str | None:
        """Return in words what else than this image the payload names; None where it is right."""
        try:
            critical = json.loads(self.payload)["critical"]
            kind, signed = critical["type"], critical["image"]["docker-manifest-digest"]
            identity = critical["identity"]["docker-reference"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return "no payload of cosign's"
        if kind != KIND:
            return f"of type {str(kind)[:40]!r}, expected {KIND!r}"
        if signed != digest:
            return f"for the image {str(signed)[:80]}"
        if reference.layout is None and not _is_repository(identity, reference):
            return f"for the repository {str(identity)[:200]!r}"
        return None


def tag(digest: str) -> str:
    """Return the tag under which the signatures of the image `digest` are."""
    return f"{digest.replace(':', '-')}.sig"


def sign(store: Store, reference: Reference, digest: str, key: SigningKey) -> None:
    """Add `key`'s signature of the image to those that it has; nothing is written where it is there.

    Inside `store.writing()`. The image itself need not be there yet.
    """
    payload = _payload(reference, digest)
    found = read(store, reference, digest)
    if any(each.payload == payload and each.signer([key.public]) for each in found):
        return
    if len(found) >= MOST_SIGNATURES:
        raise RegistryError(f"{reference}: has {len(found)} signatures already; delete the tag {tag(digest)}")
    blob = from_bytes(payload, PAYLOAD)
    layer = Descriptor(PAYLOAD, blob.descriptor.digest, blob.descriptor.size, {
        SIGNATURE: base64.b64encode(key.sign(payload)).decode(),
    })  # fmt: skip
    layers = [*(each.layer for each in found), layer]
    config = from_bytes(_encode(_config(layers)), CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor.as_json(),
        "layers": [each.as_json() for each in layers],
    }
    for each in (blob, config):
        store.put_blob(each, unreported)
    store.put_manifest(StoredManifest(_encode(manifest), MANIFEST), tag(digest))
    log.info("signed %s@%s with the key %s", reference, digest, key.public.id[:12])


def read(store: Store, reference: Reference, digest: str) -> list[ImageSignature]:
    """Return the signatures of the image, unchecked; RegistryError for what cannot be read as such."""
    stored = store.find(tag(digest))
    if stored is None:
        return []
    where = f"{reference}: the signatures at {tag(digest)}"
    layers = manifests.read(stored, where).layers
    if len(layers) > MOST_SIGNATURES:
        raise RegistryError(f"{where}: {len(layers)} of them, expected at most {MOST_SIGNATURES}; refused")
    found = []
    for layer in layers:
        if layer.media_type != PAYLOAD or layer.size > _MOST_PAYLOAD_BYTES:
            continue
        try:
            signature = base64.b64decode(layer.annotations.get(SIGNATURE, ""), validate=True)
        except (binascii.Error, ValueError):
            signature = b""
        found.append(ImageSignature(store.read(layer), signature, layer))
    return found


def require(
    store: Store, reference: Reference, digests: Sequence[str], keys: Sequence[VerificationKey]
) -> VerificationKey:
    """Return the one of `keys` that has signed the image; RegistryError that says why none has.

    digests: the image's, and the index's by which it was found: either may be signed.
    """
    names = ", ".join(key.name for key in keys)
    others, faults = 0, []
    for digest in dict.fromkeys(digests):
        for each in read(store, reference, digest):
            key = each.signer(keys)
            if key is None:
                others += 1
            elif (fault := each.fault(reference, digest)) is None:
                return key
            else:
                faults.append(f"the signature by {key.name} is {fault}")
    what = str(replace(reference, digest=digests[-1]))
    if faults:
        raise RegistryError(f"{what}: {faults[0]}, not for this one; refused")
    if others:
        said = counted(others, "signature")
        raise RegistryError(f"{what}: has {said}, none by the required key {names}; refused")
    raise RegistryError(f"{what}: is not signed; expected a signature by {names}, as `push --sign` makes it")


def _payload(reference: Reference, digest: str) -> bytes:
    name = "" if reference.layout is not None else f"{reference.registry}/{reference.repository}"
    critical = {
        "identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": digest},
        "type": KIND,
    }
    return _encode({"critical": critical, "optional": None})


def _config(layers: Sequence[Descriptor]) -> dict[str, Any]:
    """Return the image configuration that cosign writes: empty but for the layers' digests."""
    never = "0001-01-01T00:00:00Z"
    return {
        "architecture": "",
        "created": never,
        "history": [{"created": never} for _ in layers],
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        "config": {},
    }


def _is_repository(identity: object, reference: Reference) -> bool:
    """Whether a payload's docker-reference, with or without a tag, is the repository of `reference`."""
    try:
        named = parse(str(identity))
    except ConfigError:
        return False
    return (named.registry, named.repository) == (reference.registry, reference.repository)


def _encode(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
