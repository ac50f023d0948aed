"""One repository in a registry, to push to and pull from.

The session is oras'; uploads and downloads are ours (upload.py, download.py; transport.py says why), and so
are the addresses: oras takes `localhost`, or a first name with a dot, for something else.
Start at `Repository`.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import requests

from runtime.errors import RegistryError, TransientError
from runtime.net import RetriableError
from runtime.oci import manifests, referrers
from runtime.oci.access import Access
from runtime.oci.auth import Login
from runtime.oci.blobs import Blob, Descriptor, is_digest
from runtime.oci.download import BlobDownload
from runtime.oci.image import INDEX, MANIFEST
from runtime.oci.reference import Reference
from runtime.oci.responses import succeeded, unexpected
from runtime.oci.store import Report, StoredManifest, check_manifest, check_small
from runtime.oci.transport import Outgoing, Transport
from runtime.oci.upload import BlobUrls, rehearse, upload

log = logging.getLogger(__name__)

_HUB_HOST = "registry-1.docker.io"
_ACCEPTED = ", ".join((MANIFEST, INDEX, manifests.DOCKER_MANIFEST, manifests.DOCKER_LIST))


class Repository:
    """The repository of a reference (a `Store`); reading asks for pull, the first write for push too."""

    def __init__(self, reference: Reference, access: Access):
        host = _HUB_HOST if reference.registry == "docker.io" else reference.registry
        self._reference = reference
        self._transport = Transport(host, access)
        self._base = f"{self._transport.base}v2/{reference.repository}"
        self._login = Login(self._transport, reference, "pull")

    def __str__(self) -> str:
        return f"{self._reference.registry}/{self._reference.repository}"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Log in for push; registries need no lock, their manifests and blobs appear whole."""
        self._login = Login(self._transport, self._reference, "pull,push")
        yield

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def check_writable(self) -> None:
        """Send a blob and cancel it."""
        with self.writing():
            session = rehearse(self._transport, self._uploads_url)
            # Not every registry deletes an upload on request; one that keeps it drops it after a while.
            self._login = Login(self._transport, self._reference, "pull,push,delete")
            with contextlib.suppress(RegistryError, TransientError, RetriableError):
                self._transport.send(Outgoing("DELETE", session, {}))
            self._login = Login(self._transport, self._reference, "pull,push")

    def find(self, selector: str) -> StoredManifest | None:
        """Return the manifest under a tag or digest."""
        url = self._manifest_url(selector)
        response = self._transport.do_request(url, headers={"Accept": _ACCEPTED})
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise unexpected(response, f"{self}: reading manifest {selector}")
        data = response.content
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        manifest = StoredManifest(data, media_type)
        if stated_type := manifest.document.get("mediaType"):
            manifest = StoredManifest(data, str(stated_type))
        stated = response.headers.get("Docker-Content-Digest", manifest.digest)
        if stated.startswith("sha256:"):
            check_manifest(manifest, stated, str(self))
        return check_manifest(manifest, selector, str(self))

    def digest_of(self, selector: str) -> str | None:
        """Return the digest of the manifest under a tag, which is not read; None when there is none."""
        url = self._manifest_url(selector)
        response = self._transport.do_request(url, "HEAD", headers={"Accept": _ACCEPTED})
        stated = response.headers.get("Docker-Content-Digest", "")
        if response.status_code == 200 and is_digest(stated):
            return stated
        if response.status_code in {200, 405}:  # this registry does not say
            manifest = self.find(selector)
            return manifest.digest if manifest is not None else None
        if response.status_code == 404:
            return None
        raise unexpected(response, f"{self}: looking up {selector}")

    def put_blob(self, blob: Blob, report: Report, mount_from: str | None = None) -> None:
        """Upload `blob` unless the registry has it."""
        urls = BlobUrls(uploads=self._uploads_url, blob=self._blob_url(blob.descriptor.digest))
        if mount_from:
            self._login.add_source(mount_from)
        try:
            upload(self._transport, blob, urls=urls, report=report, source=mount_from)
        except RegistryError:
            if not mount_from:
                raise
            # No right to read the other repository, or not both at once: push without it.
            self._login = Login(self._transport, self._reference, "pull,push")
            upload(self._transport, blob, urls=urls, report=report)

    def put_manifest(self, manifest: StoredManifest, selector: str) -> None:
        """Upload a manifest; RegistryError when the registry stored another one."""
        self._put(manifest, selector)

    def attach(self, manifest: StoredManifest, subject: str) -> None:
        """Upload an artifact; a registry that does not list it by itself gets an index under a tag."""
        if self._put(manifest, manifest.digest).headers.get("OCI-Subject") == subject:
            return
        tag = referrers.fallback_tag(subject)
        index = referrers.with_one_more(self.find(tag), referrers.of(manifest), f"{self}:{tag}")
        if index is not None:
            self._put(index, tag)

    def referrers(self, subject: str) -> Iterator[StoredManifest]:
        """Yield the artifacts about `subject`: by the API, else by the index under a tag."""
        tag = referrers.fallback_tag(subject)
        response = self._transport.do_request(f"{self._base}/referrers/{subject}", headers={"Accept": INDEX})
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        if response.status_code == 200 and kind == INDEX:
            listed = StoredManifest(response.content, INDEX)
            if "next" in response.links:
                log.warning("%s: lists the referrers of %s in parts; only the first are read", self, subject)
        else:  # 404 is the specification's; older registries answer what they like to an unknown route
            found = self.find(tag)
            if found is None:
                return
            listed = found
        found_each = (self.find(each.manifest.digest) for each in referrers.read(listed, f"{self}:{tag}"))
        yield from (each for each in found_each if each is not None)

    def _put(self, manifest: StoredManifest, selector: str) -> requests.Response:
        headers = {"Content-Type": manifest.media_type}
        response = self._transport.do_request(
            self._manifest_url(selector), "PUT", headers=headers, data=manifest.data
        )
        if not succeeded(response):
            raise unexpected(response, f"{self}: writing manifest {selector}")
        stored = response.headers.get("Docker-Content-Digest") or manifest.digest
        if stored != manifest.digest:
            raise RegistryError(f"{self}: stored manifest {stored} instead of {manifest.digest}; push again")
        return response

    def fetch(self, descriptor: Descriptor, path: Path, report: Report) -> None:
        """Download a blob to `path`, which a later try continues."""
        url = self._blob_url(descriptor.digest)
        BlobDownload(self._transport, url, descriptor, str(self)).to(path, report)

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a small blob; the answer is read up to 4 MiB, whatever it states."""
        response = self._transport.do_request(self._blob_url(descriptor.digest))
        if response.status_code != 200:
            raise unexpected(response, f"{self}: reading blob {descriptor.digest}")
        return check_small(response.content, descriptor, str(self))

    def delete(self, tag: str) -> bool:
        """Delete the manifest under `tag`, where the registry allows it."""
        manifest = self.find(tag)
        if manifest is None:
            return False
        self._login = Login(self._transport, self._reference, "delete")
        try:
            response = self._transport.do_request(self._manifest_url(manifest.digest), "DELETE")
            deleted = response.status_code in {200, 202, 204, 404}
        except RegistryError:
            deleted = False
        if not deleted:
            log.warning("%s: the registry refused to delete tag %s; delete it by hand", self, tag)
        return deleted

    @property
    def _uploads_url(self) -> str:
        return f"{self._base}/blobs/uploads/"

    def _blob_url(self, digest: str) -> str:
        return f"{self._base}/blobs/{digest}"

    def _manifest_url(self, selector: str) -> str:
        return f"{self._base}/manifests/{selector}"
