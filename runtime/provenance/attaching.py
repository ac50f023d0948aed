"""Writes an image's signature, statement and bill of materials beside it while it is pushed.

The files are hashed meanwhile. A signature that was asked for must be stored; a registry that takes no
attachments is logged, as the image is whole without them. Start at `attaching`.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import RegistryError
from runtime.files import sha256
from runtime.oci import Reference, SigningKey, referrers, signatures
from runtime.oci.blobs import Blob, Descriptor, from_bytes
from runtime.oci.image import Image
from runtime.oci.store import Store, StoredManifest, unreported
from runtime.provenance import bom, statement
from runtime.provenance.facts import Facts

log = logging.getLogger(__name__)

PREDICATE = "in-toto.io/predicate-type"
"""Annotation of a statement's manifest, as BuildKit writes it."""


@contextlib.contextmanager
def attaching(
    folder: Path,
    files: Sequence[str],
    reference: Reference,
    *,
    key: SigningKey | None = None,
    stated: bool = True,
) -> Iterator[Callable[[Store, Image], None]]:
    """Yield what `oci.push_image` calls to sign the image of `files` with `key` and say where it comes from.

    stated: whether to attach the statement and the bill of materials.
    """
    if not stated:
        yield _Attaching(folder, reference, key, None).write
        return
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        hashes = pool.submit(lambda: {name: sha256(folder / name) for name in files})
        yield _Attaching(folder, reference, key, hashes).write


@dataclass(frozen=True, slots=True)
class _Attaching:
    folder: Path
    reference: Reference
    key: SigningKey | None
    hashes: Future[dict[str, str]] | None

    def write(self, store: Store, image: Image) -> None:
        if self.key is not None:
            signatures.sign(store, self.reference, image.digest, self.key)
        if self.hashes is None:
            return
        stated, listed = self._documents(image, self.hashes.result())
        subject = Descriptor(image.media_type, image.digest, len(image.manifest))
        try:
            for blob, kind in ((listed, bom.MEDIA_TYPE), (stated, statement.MEDIA_TYPE)):
                notes = {PREDICATE: statement.PREDICATE_TYPE} if blob is stated else {}
                made = referrers.artifact(blob, kind=kind, subject=subject, annotations=notes)
                for each in made.blobs:
                    store.put_blob(each, unreported)
                store.attach(StoredManifest(made.manifest, made.media_type), image.digest)
        except RegistryError as error:
            log.warning("%s: pushed without a statement of where it comes from: %s", self.reference, error)

    def _documents(self, image: Image, hashes: dict[str, str]) -> tuple[Blob, Blob]:
        """Return the statement, in an envelope where there is a key, and the bill of materials."""
        facts = Facts.read(self.folder)
        name = self.reference.repository and f"{self.reference.registry}/{self.reference.repository}"
        name = name or "image"
        listed = from_bytes(_encode(bom.build(facts, hashes, name=name, digest=image.digest)), bom.MEDIA_TYPE)
        digest = listed.descriptor.digest.removeprefix("sha256:")
        data = _encode(statement.build(facts, hashes, name=name, digest=image.digest, bom_sha256=digest))
        if self.key is None:
            return from_bytes(data, statement.MEDIA_TYPE), listed
        return from_bytes(statement.seal(data, self.key), statement.ENVELOPE), listed


def _encode(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode(
        "utf-8", "replace"
    )
