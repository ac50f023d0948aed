"""The interface that push and pull need of an image store: a layout on disk or a repository.

Start at `Store`; layout.py and repository.py implement it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import RegistryError
from runtime.oci.blobs import Blob, Descriptor

Report = Callable[[int], None]
"""Called with the number of bytes just transferred, negative for bytes to be transferred again.

Raises TransferCancelledError when the transfer is to end at once.
"""


def unreported(size: int) -> None:
    """Show no progress (a `Report`): what is sent is a few hundred bytes."""


class AccessDeniedError(RegistryError):
    """A registry does not let us read or write this repository; some say so of those that are not there."""


class TransferCancelledError(Exception):
    """Another part of the same transfer failed, or the process has to stop."""


def _nothing(*_: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Watch:
    """What is asked while an image is pulled: each raises a Failure to end the pull."""

    image: Callable[[int], object] = _nothing
    """Called with the bytes that the image says it has, before any is fetched."""
    files: Callable[[int], object] = _nothing
    """Called with the bytes of its files, before any is written."""
    chunk: Callable[[], object] = _nothing
    """Called with each chunk that arrives."""


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest as stored: its exact bytes."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        """Digest of the bytes."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object that the bytes are; {} where they are anything else."""
        try:
            document = json.loads(self.data)
        except (ValueError, RecursionError):
            return {}
        return document if isinstance(document, dict) else {}


class Store(Protocol):
    """Manifests by tag or digest, and blobs by digest."""

    def writing(self) -> AbstractContextManager[None]:
        """Keep other writers out while the block runs, where the store can."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...

    def check_writable(self) -> None:
        """Prove that a push would be allowed, leaving nothing behind."""
        ...

    def find(self, selector: str) -> StoredManifest | None:
        """Return the manifest under a tag or digest, None when there is none."""
        ...

    def put_blob(self, blob: Blob, report: Report, mount_from: str | None = None) -> None:
        """Store `blob` unless it is there."""
        ...

    def put_manifest(self, manifest: StoredManifest, selector: str) -> None:
        """Store `manifest` under a tag or its digest; everything it names must be there."""
        ...

    def fetch(self, descriptor: Descriptor, path: Path, report: Report) -> None:
        """Write the verified bytes of a blob to `path`, resuming an earlier try."""
        ...

    def read(self, descriptor: Descriptor) -> bytes:
        """Return the verified bytes of a small blob; RegistryError above 4 MiB."""
        ...

    def attach(self, manifest: StoredManifest, subject: str) -> None:
        """Store the manifest of an artifact about the image `subject`, a digest, and list it with that."""
        ...

    def referrers(self, subject: str) -> Iterator[StoredManifest]:
        """Yield the manifests of the artifacts about the image `subject`, a digest, each read in its turn."""
        ...

    def delete(self, tag: str) -> bool:
        """Remove the manifest under `tag`; False when the store does not allow that or has none."""
        ...


def check_manifest(manifest: StoredManifest, selector: str, where: str) -> StoredManifest:
    """Return `manifest`; RegistryError when `selector` is a digest other than its own."""
    if selector.startswith("sha256:") and manifest.digest != selector:
        raise RegistryError(
            f"{where}: requested {selector} and got {manifest.digest}; the stored image is damaged"
        )
    return manifest


def check_small(data: bytes, descriptor: Descriptor, where: str) -> bytes:
    """Return the bytes of a blob; RegistryError when they are others than `descriptor` says."""
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != descriptor.digest or len(data) != descriptor.size:
        raise RegistryError(
            f"{where}: blob {descriptor.digest} is damaged in the store; push the image again"
        )
    return data
