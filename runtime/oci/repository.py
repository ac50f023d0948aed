"""One repository in a registry, to push to and pull from.

The addresses, tags and the session are oras'; uploads and downloads are ours (see upload.py and
transport.py for why). Start at `Repository`.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import requests

from runtime.errors import RegistryError
from runtime.files import disk_errors
from runtime.net import RetriableError, first_byte, part_of
from runtime.oci import manifests
from runtime.oci.access import Access
from runtime.oci.auth import Login
from runtime.oci.blobs import READ_BYTES, Blob, Descriptor
from runtime.oci.image import INDEX, MANIFEST
from runtime.oci.reference import Reference
from runtime.oci.store import Report, StoredManifest, check_manifest
from runtime.oci.transport import Transport, raise_if_busy, unexpected
from runtime.oci.upload import BlobUrls, upload

log = logging.getLogger(__name__)

_HUB_HOST = "registry-1.docker.io"
_MAX_MANIFEST_BYTES = 4 << 20
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
        if len(data) > _MAX_MANIFEST_BYTES:
            raise RegistryError(f"{self}: manifest {selector} has {len(data)} bytes; expected at most 4 MiB")
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
        """Download a blob to `path` by way of `part_of(path)`, which a later try continues."""
        part = part_of(path)
        retries = self._transport.retries(f"{self}: download of {descriptor.digest[:19]}")
        for again in (True, False):
            while True:
                before = part.stat().st_size if part.exists() else 0
                try:
                    sha = self._continue(descriptor, part, report)
                    break
                except RetriableError as error:
                    if part.exists() and part.stat().st_size > before:
                        retries.progressed()
                    retries.failed(error)
            if f"sha256:{sha}" == descriptor.digest:
                part.replace(path)
                return
            part.unlink(missing_ok=True)
            report(-descriptor.size)
            if again:  # the bytes of an earlier run may be the damaged ones
                log.warning("%s: blob %s arrived damaged; downloading it once more", self, descriptor.digest)
        raise RegistryError(
            f"{self}: blob {descriptor.digest} has other bytes in the registry; push the image again"
        )

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

    def _continue(self, descriptor: Descriptor, part: Path, report: Report) -> str:
        """Append the missing bytes to `part`; return the hexadecimal digest of the whole."""
        with disk_errors(part, descriptor.size), part.open("a+b") as file:
            arrived = _ArrivedBytes(file, report)
            if arrived.size < descriptor.size:
                response = self._request_from(descriptor, arrived.size)
                if arrived.size and not first_byte(response, arrived.size):  # the registry sends everything
                    arrived.discard()
                report(arrived.size)
                self._receive(response, descriptor.size, arrived)
            else:
                report(arrived.size)
        return arrived.sha256

    def _request_from(self, descriptor: Descriptor, start: int) -> requests.Response:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        url = self._url(self._container.get_blob_url(descriptor.digest))
        response = self._transport.send("GET", url, headers=headers, stream=True)
        raise_if_busy(response)
        if first_byte(response, start) is not None:
            return response
        if response.status_code == 206:
            raise RetriableError("the registry sent another range than requested")
        if response.status_code == 404:
            raise RegistryError(
                f"{self}: blob {descriptor.digest} is missing in the registry; push the image again"
            )
        raise unexpected(response, f"{self}: downloading {descriptor.digest}")

    def _receive(self, response: requests.Response, size: int, arrived: "_ArrivedBytes") -> None:
        """Take in the body until there are `size` bytes; RetriableError when it ends before."""
        try:
            for chunk in response.iter_content(READ_BYTES):
                if arrived.size + len(chunk) > size:
                    raise RegistryError(
                        f"{self}: a blob is longer than the manifest says; push the image again"
                    )
                arrived.append(chunk)
        except requests.exceptions.RequestException as error:
            arrived.interrupted()
            raise RetriableError(f"connection lost in the middle ({type(error).__name__})") from None
        finally:
            response.close()
        if arrived.size < size:
            arrived.interrupted()
            raise RetriableError("connection closed in the middle")

    def _request(self, method: str, address: str, **options: Any) -> requests.Response:
        return self._transport.do_request(self._url(address), method, **options)

    def _url(self, address: str) -> str:
        return f"{self._transport.prefix}://{address}"


class _ArrivedBytes:
    """The file that a blob grows in: hashes and reports what is in it and what is appended."""

    def __init__(self, file: BinaryIO, report: Report):
        self._file, self._report = file, report
        self._sha256 = hashlib.sha256()
        file.seek(0)
        while chunk := file.read(READ_BYTES):
            self._sha256.update(chunk)
        self.size = file.tell()

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of all bytes."""
        return self._sha256.hexdigest()

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._sha256.update(chunk)
        self.size += len(chunk)
        self._report(len(chunk))

    def discard(self) -> None:
        """Begin with an empty file."""
        self._file.truncate(0)
        self._sha256, self.size = hashlib.sha256(), 0

    def interrupted(self) -> None:
        """Take back what was reported: the next request reports the bytes that it continues after."""
        self._file.flush()
        self._report(-self.size)


def _stated_type(data: bytes) -> str:
    try:
        return str(json.loads(data).get("mediaType") or "")
    except (ValueError, AttributeError):
        return ""
