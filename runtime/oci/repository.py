"""One repository in a registry, to push to and pull from.

The addresses, tags and the session are oras'; uploads and downloads are ours (upload.py, download.py;
transport.py says why). Start at `Repository`.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from runtime.errors import RegistryError
from runtime.net import RetriableError
from runtime.oci import manifests
from runtime.oci.access import Access
from runtime.oci.auth import Login
from runtime.oci.blobs import Blob, Descriptor
from runtime.oci.download import BlobDownload
from runtime.oci.image import INDEX, MANIFEST
from runtime.oci.reference import Reference
from runtime.oci.store import Report, StoredManifest, check_manifest
from runtime.oci.transport import Transport, unexpected
from runtime.oci.upload import BlobUrls, upload

log = logging.getLogger(__name__)

_HUB_HOST = "registry-1.docker.io"
_ACCEPTED = ", ".join((MANIFEST, INDEX, manifests.DOCKER_MANIFEST, manifests.DOCKER_LIST))


class Repository:
    """The repository of a reference (a `Store`); reading asks for pull, the first write for push too."""

    def __init__(self, reference: Reference, access: Access):
        host = _HUB_HOST if reference.registry == "docker.io" else reference.registry
        self._reference = reference
        self._transport = Transport(host, access)
        self._container = self._transport.get_container(
            f"{host}/{reference.repository}:{reference.tag or 'latest'}"
        )
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
        self._transport.session.close()

    def check_writable(self) -> None:
        """Start an upload and cancel it."""
        with self.writing():
            response = self._request(
                "POST", self._container.upload_blob_url(), headers={"Content-Length": "0"}
            )
            if response.status_code != 202:
                raise unexpected(response, f"{self}: starting an upload")
            session = requests.compat.urljoin(response.url, response.headers.get("Location", ""))
            # Not every registry deletes an upload on request; one that keeps it drops it after a while.
            self._login = Login(self._transport, self._reference, "pull,push,delete")
            with contextlib.suppress(RegistryError, RetriableError):
                self._transport.send("DELETE", session)

    def find(self, selector: str) -> StoredManifest | None:
        """Return the manifest under a tag or digest."""
        url = self._container.manifest_url(selector)
        response = self._request("GET", url, headers={"Accept": _ACCEPTED})
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise unexpected(response, f"{self}: reading manifest {selector}")
        data = response.content
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        manifest = StoredManifest(data, _stated_type(data) or media_type)
        stated = response.headers.get("Docker-Content-Digest", manifest.digest)
        if stated.startswith("sha256:"):
            check_manifest(manifest, stated, str(self))
        return check_manifest(manifest, selector, str(self))

    def put_blob(self, blob: Blob, report: Report, mount_from: str | None = None) -> None:
        """Upload `blob` unless the registry has it."""
        urls = BlobUrls(
            uploads=self._url(self._container.upload_blob_url()),
            blob=self._url(self._container.get_blob_url(blob.descriptor.digest)),
        )
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
        url = self._container.manifest_url(selector)
        headers = {"Content-Type": manifest.media_type}
        response = self._request("PUT", url, headers=headers, data=manifest.data)
        if response.status_code not in {200, 201, 202}:
            raise unexpected(response, f"{self}: writing manifest {selector}")
        stored = response.headers.get("Docker-Content-Digest", manifest.digest)
        if stored != manifest.digest:
            raise RegistryError(f"{self}: stored manifest {stored} instead of {manifest.digest}; push again")

    def fetch(self, descriptor: Descriptor, path: Path, report: Report) -> None:
        """Download a blob to `path`, which a later try continues."""
        url = self._url(self._container.get_blob_url(descriptor.digest))
        BlobDownload(self._transport, url, descriptor, str(self)).to(path, report)

    def delete(self, tag: str) -> bool:
        """Delete the manifest under `tag`, where the registry allows it."""
        manifest = self.find(tag)
        if manifest is None:
            return False
        self._login = Login(self._transport, self._reference, "delete")
        try:
            response = self._request("DELETE", self._container.manifest_url(manifest.digest))
            deleted = response.status_code in {200, 202, 204, 404}
        except RegistryError:
            deleted = False
        if not deleted:
            log.warning("%s: the registry refused to delete tag %s; delete it by hand", self, tag)
        return deleted

    def _request(self, method: str, address: str, **options: Any) -> requests.Response:
        return self._transport.do_request(self._url(address), method, **options)

    def _url(self, address: str) -> str:
        return f"{self._transport.prefix}://{address}"


def _stated_type(data: bytes) -> str:
    try:
        return str(json.loads(data).get("mediaType") or "")
    except (ValueError, AttributeError):
        return ""
