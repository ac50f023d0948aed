"""Reads what is attached to an image: signatures with their state, the statement, the bill of materials.

All of it may have been written by anybody, and by an honest pusher it is only what that one says: who has
signed it is told with it. Start at `attached`.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from runtime.errors import RegistryError
from runtime.oci import Access, ImageInfo, Reference, VerificationKey, images, manifests, signatures
from runtime.oci.store import Store, StoredManifest
from runtime.packing import as_object
from runtime.provenance import bom, statement

_MOST_EACH = 16


@dataclass(frozen=True, slots=True)
class StatementFound:
    """A statement about an image."""

    document: dict[str, Any]
    state: str
    """Whose it is, in words."""

    @property
    def facts(self) -> dict[str, Any]:
        """The chief of what it says, by short names: the base model, the data, the scores, the version."""
        predicate = as_object(self.document.get("predicate"))
        definition = as_object(predicate.get("buildDefinition"))
        builder = as_object(as_object(predicate.get("runDetails")).get("builder"))
        inputs = definition.get("resolvedDependencies")
        named = [as_object(each) for each in inputs] if isinstance(inputs, list) else []
        found: dict[str, Any] = {"build type": definition.get("buildType")}
        for entry in named[:_MOST_EACH]:
            digests = as_object(entry.get("digest"))
            known = " ".join(f"{name}:{digest}" for name, digest in digests.items())
            found[f"from {entry.get('name')}"] = " ".join(filter(None, (str(entry.get("uri") or ""), known)))
        if len(named) > _MOST_EACH:
            found["from"] = f"{len(named) - _MOST_EACH} more"
        return found | as_object(predicate.get(statement.SCORES)) | as_object(builder.get("version"))


@dataclass(frozen=True, slots=True)
class Attached:
    """What stands beside an image."""

    signatures: tuple[str, ...]
    """The state of each, in words."""
    statements: tuple[StatementFound, ...]
    boms: tuple[dict[str, Any], ...]
    others: tuple[str, ...]
    """The types of the further artifacts about the image."""


def attached(
    reference: Reference, info: ImageInfo, keys: Sequence[VerificationKey], *, access: Access
) -> Attached:
    """Return what is attached to the image `info`; `keys` are those whose signatures count."""
    statements: list[StatementFound] = []
    boms: list[dict[str, Any]] = []
    others: list[str] = []
    with closing(images.open_store(reference, access)) as store:
        found = [
            _state(each, reference, digest, keys)
            for digest in dict.fromkeys((info.named_digest, info.digest))
            for each in signatures.read(store, reference, digest)
        ]
        for manifest in store.referrers(info.digest):
            kind = str(manifest.document.get("artifactType") or "")
            try:
                if kind == statement.MEDIA_TYPE and len(statements) < _MOST_EACH:
                    statements.append(_statement(store, manifest, info.digest, keys))
                elif kind == bom.MEDIA_TYPE and len(boms) < _MOST_EACH:
                    boms.append(_object(_content(store, manifest)[1]))
                else:
                    others.append(kind or manifest.digest)
            except RegistryError as error:
                others.append(f"{kind}: {error}")
    return Attached(tuple(found), tuple(statements), tuple(boms), tuple(others))


def _state(
    signature: signatures.ImageSignature, reference: Reference, digest: str, keys: Sequence[VerificationKey]
) -> str:
    signer, fault = signature.signer(keys), signature.fault(reference, digest)
    if signer is not None:
        return f"by {signer.name}: refused, it is {fault}" if fault else f"by {signer.name}: valid"
    if fault:
        return f"refused, it is {fault}"
    return "by another key than those given" if keys else "not checked: no key was given"


def _statement(
    store: Store, manifest: StoredManifest, digest: str, keys: Sequence[VerificationKey]
) -> StatementFound:
    kind, data = _content(store, manifest)
    document, signer, state = _object(data), None, "not signed"
    if kind == statement.ENVELOPE:
        document, signer = statement.unseal(data, keys) or ({}, None)
        state = "signed by another key than those given" if keys else "signed, not checked: no key was given"
    if signer is not None:
        state = f"signed by {signer.name}"
    if digest.removeprefix("sha256:") not in _subjects(document):
        state = "refused, it is about another image"
    return StatementFound(document, state)


def _subjects(document: dict[str, Any]) -> list[Any]:
    """Return the digests of what a statement is about."""
    subjects = document.get("subject")
    entries = subjects if isinstance(subjects, list) else []
    return [as_object(as_object(each).get("digest")).get("sha256") for each in entries]


def _content(store: Store, manifest: StoredManifest) -> tuple[str, bytes]:
    """Return the media type and the bytes of an artifact's only layer."""
    layers = manifests.read(manifest, f"artifact {manifest.digest}").layers
    if len(layers) != 1:
        raise RegistryError(f"artifact {manifest.digest}: {len(layers)} layers, expected one")
    return layers[0].media_type, store.read(layers[0])


def _object(data: bytes) -> dict[str, Any]:
    try:
        return as_object(json.loads(data))
    except (ValueError, RecursionError):
        return {}
