"""An OCI image layout on disk, for users without a registry.

Blobs and the index are written atomically, and writers hold a lock, so two jobs may push to one
layout. Tools read it as `oci:DIRECTORY:tag` (skopeo, umoci, podman), and what they write is read: images
without a tag, and with their full name. Start at `Layout`.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import ConfigError, RegistryError
from runtime.files import atomic_file, check_folder, disk_errors, locked, remove_abandoned
from runtime.oci import referrers
from runtime.oci.blobs import Blob, Descriptor, Reader, is_digest, read_all
from runtime.oci.image import INDEX, MANIFEST
from runtime.oci.store import Report, StoredManifest, check_manifest, check_small

_TAG = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
_ABOUT = re.compile(r"sha256-[0-9a-f]{64}(\.sig)?")
_VERSION = b'{"imageLayoutVersion":"1.0.0"}'
_MOST_JSON_BYTES = 4 << 20
_MOST_INDEXES = 4
"""Indexes inside each other."""


class Layout:
    """The layout in one directory (a `Store`)."""

    def __init__(self, root: Path):
        self._root = root

    def __str__(self) -> str:
        return f"oci:{self._root}"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Create the layout when missing and hold its lock while the block runs."""
        self.check_writable()
        with disk_errors(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            version = self._root / "oci-layout"
            with locked(version, waiting=f"{self}: another process writes to the layout, waiting for it"):
                if version.stat().st_size != len(_VERSION):
                    version.write_bytes(_VERSION)  # in place: its lock is held
                self._blobs.mkdir(parents=True, exist_ok=True)
                remove_abandoned(self._blobs)
                yield

    def close(self) -> None:
        """Nothing is held open."""

    def check_writable(self) -> None:
        """Raise ConfigError unless files can be made in the directory (or in the nearest one that exists)."""
        with disk_errors(self._root):
            check_folder(self._root, "a directory for the OCI layout")
            if self._root.is_dir() and any(self._root.iterdir()) and not (self._root / "oci-layout").exists():
                raise ConfigError(
                    f"{self._root}: holds files but no OCI layout; name an empty or new directory"
                )
            existing = next(p for p in (self._root.absolute(), *self._root.absolute().parents) if p.exists())
            with tempfile.TemporaryFile(dir=existing):
                pass  # without a name, which a killed process would leave

    def find(self, selector: str) -> StoredManifest | None:
        """Return the manifest under a tag or digest."""
        entry = self._entry(selector)
        if entry is None and selector.startswith("sha256:") and self._path(selector).is_file():
            entry = {"digest": selector}
        return None if entry is None else self._manifest(entry)

    def find_only(self) -> StoredManifest | None:
        """Return the only image of the layout, whatever its tag; RegistryError where there are several."""
        entries = {entry["digest"]: entry for entry in self._entries() if not _is_about_another(entry)}
        if len(entries) > 1:
            named = ", ".join(sorted(map(_name, entries.values()))[:10])
            raise RegistryError(
                f"{self}: holds {len(entries)} images, name one by its tag or digest: {named}"
            )
        return next(map(self._manifest, entries.values()), None)

    def _manifest(self, entry: dict[str, Any]) -> StoredManifest:
        path = self._existing(entry["digest"])
        manifest = StoredManifest(_read_json(path), str(entry.get("mediaType") or MANIFEST))
        return check_manifest(manifest, entry["digest"], str(self))

    def tags(self) -> list[str]:
        """Return the tags of the layout."""
        return [tag for entry in self._entries() if (tag := _annotations(entry).get(_TAG))]

    def put_blob(self, blob: Blob, report: Report, mount_from: str | None = None) -> None:
        """Copy `blob` into the layout unless it is there."""
        wanted = blob.descriptor
        target = self._path(wanted.digest)
        if target.is_file() and target.stat().st_size == wanted.size:
            report(wanted.size)
            return
        with disk_errors(self._root, wanted.size), _new_file(target) as file:
            if _copy(blob.open(), file, report) != wanted.digest:
                raise ConfigError(
                    f"{self}: a file changed while it was being pushed; do not write to it meanwhile"
                )

    def put_manifest(self, manifest: StoredManifest, selector: str) -> None:
        """Write the manifest and, when `selector` is a tag, point the tag at it."""
        with disk_errors(self._root):
            with _new_file(self._path(manifest.digest)) as file:
                file.write(manifest.data)
            entry: dict[str, Any] = {
                "mediaType": manifest.media_type,
                "digest": manifest.digest,
                "size": len(manifest.data),
            }
            if not selector.startswith("sha256:"):
                entry["annotations"] = {_TAG: selector}
            others = [e for e in self._entries() if _annotations(e).get(_TAG) != selector]
            self._write_index([*others, entry])

    def attach(self, manifest: StoredManifest, subject: str) -> None:
        """Write an artifact's manifest, and its place in the index of the referrers of `subject`."""
        tag = referrers.fallback_tag(subject)
        with disk_errors(self._root), _new_file(self._path(manifest.digest)) as file:
            file.write(manifest.data)
        index = referrers.with_one_more(self.find(tag), referrers.of(manifest), f"{self}:{tag}")
        if index is not None:
            self.put_manifest(index, tag)

    def referrers(self, subject: str) -> Iterator[StoredManifest]:
        """Yield the artifacts about `subject`."""
        tag = referrers.fallback_tag(subject)
        listed = referrers.read(self.find(tag), f"{self}:{tag}")
        found = (self.find(each.manifest.digest) for each in listed)
        yield from (each for each in found if each is not None)

    def fetch(self, descriptor: Descriptor, path: Path, report: Report) -> None:
        """Copy a blob to `path`, checking its digest."""
        source = self._existing(descriptor.digest)
        with disk_errors(path.parent, descriptor.size), _new_file(path) as file:
            if _copy(source.open("rb"), file, report) != descriptor.digest:
                raise RegistryError(
                    f"{self}: blob {descriptor.digest} is damaged on disk; push the image again"
                )

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a small blob."""
        return check_small(_read_json(self._existing(descriptor.digest)), descriptor, str(self))

    def delete(self, tag: str) -> bool:
        """Remove the tag and the blobs that no other image of the layout uses."""
        if tag not in self.tags():
            return False
        with self.writing():
            entries = self._entries()
            kept = [e for e in entries if _annotations(e).get(_TAG) != tag]
            gone = {digest for e in entries if e not in kept for digest in self._reachable(e["digest"])}
            used = {digest for e in kept for digest in self._reachable(e["digest"])}
            self._write_index(kept)
            for digest in gone - used:
                self._path(digest).unlink(missing_ok=True)
        return True

    @property
    def _blobs(self) -> Path:
        return self._root / "blobs/sha256"

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def _existing(self, digest: str) -> Path:
        path = self._path(digest)
        if not path.is_file():
            raise RegistryError(f"{self}: blob {digest} is missing; push the image again")
        return path

    def _index(self) -> dict[str, Any]:
        path = self._root / "index.json"
        if not path.is_file():
            return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
        try:
            index: dict[str, Any] = json.loads(_read_json(path))
            for entry in index["manifests"]:
                if not is_digest(entry["digest"]) or not isinstance(_annotations(entry), dict):
                    raise ValueError(entry)
            index["manifests"] = list(index["manifests"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RegistryError(
                f"{path}: not an OCI index; name another directory or remove this one"
            ) from None
        return index

    def _entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._index()["manifests"]
        return found

    def _write_index(self, entries: list[dict[str, Any]]) -> None:
        index = self._index() | {"manifests": entries}
        with _new_file(self._root / "index.json") as file:
            file.write(json.dumps(index, indent=1).encode())

    def _entry(self, selector: str) -> dict[str, Any] | None:
        """Return the entry of a digest or a tag, else the only one whose full name ends in the tag."""
        entries = self._entries()
        for entry in entries:
            if selector in (entry["digest"], _annotations(entry).get(_TAG)):
                return entry
        named = {entry["digest"]: entry for entry in entries if _ends_in_tag(entry, selector)}
        if len(named) > 1:
            names = ", ".join(sorted(map(_name, named.values()))[:10])
            raise RegistryError(
                f"{self}: several images are tagged {selector!r}, name one by its digest: {names}"
            )
        return next(iter(named.values()), None)

    def _reachable(self, digest: str, depth: int = 0) -> set[str]:
        """Return the digests of a manifest and of all that it names."""
        try:
            manifest = json.loads(_read_json(self._path(digest)))
            named = [*manifest.get("layers", []), manifest.get("config", {})]
            indexed = [entry["digest"] for entry in manifest.get("manifests", []) if depth < _MOST_INDEXES]
            found = {digest, *indexed, *(entry.get("digest") for entry in named)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RegistryError):
            return {digest}
        below = {d for entry in indexed if is_digest(entry) for d in self._reachable(entry, depth + 1)}
        return {entry for entry in found | below if is_digest(entry)}


def _annotations(entry: dict[str, Any]) -> dict[str, str]:
    return entry.get("annotations") or {}


def _is_about_another(entry: dict[str, Any]) -> bool:
    """Whether an entry holds the signatures or the referrers of another image, by its tag."""
    return _ABOUT.fullmatch(_annotations(entry).get(_TAG) or "") is not None


def _name(entry: dict[str, Any]) -> str:
    """Return an entry's name for a message: as it is written, with its digest."""
    return f"{_annotations(entry).get(_TAG) or 'without a tag'} ({entry['digest']})"


def _ends_in_tag(entry: dict[str, Any], tag: str) -> bool:
    """Whether an entry is named in full, as docker buildx and containerd do it: host/repository:tag."""
    names = (_annotations(entry).get(key) for key in (_TAG, _FULL_NAME))
    return any(name.endswith(f":{tag}") for name in names if isinstance(name, str))


def _read_json(path: Path) -> bytes:
    """Return the bytes of a manifest or index; RegistryError above 4 MiB."""
    size = path.stat().st_size
    if size > _MOST_JSON_BYTES:
        raise RegistryError(f"{path}: {size} bytes, expected a manifest or index of at most 4 MiB")
    return path.read_bytes()


def _copy(reader: Reader, file: BinaryIO, report: Report) -> str:
    """Write the bytes of `reader` to `file`, close the reader, and return their digest."""
    sha = hashlib.sha256()
    for chunk in read_all(reader):
        sha.update(chunk)
        file.write(chunk)
        report(len(chunk))
    return f"sha256:{sha.hexdigest()}"


def _new_file(path: Path) -> AbstractContextManager[BinaryIO]:
    """Yield a file that becomes `path` when the block ends well, readable to all users."""
    return atomic_file(path, mode=0o644)
