"""One repository in a registry, as a place to push to and pull from.

The addresses, tags and the session are oras'; uploads and downloads are ours (upload.py, transport.py
say why). Start at `Repository`.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from runtime.errors import RegistryError
from runtime.files import disk_errors
from runtime.net import RetriableError, first_byte, part_of
from runtime.oci import contents
from runtime.oci.access import Access
from runtime.oci.auth import Login
from runtime.oci.blobs import READ_BYTES, Blob, Descriptor
from runtime.oci.image import INDEX, MANIFEST
from runtime.oci.reference import Reference
from runtime.oci.store import Manifest, Report, check_manifest
from runtime.oci.transport import Transport, raise_if_busy, unexpected
from runtime.oci.upload import upload

log = logging.getLogger(__name__)

_HUB_HOST = "registry-1.docker.io"
_MAX_MANIFEST_BYTES = 4 << 20
_ACCEPTED = ", ".join((MANIFEST, INDEX, contents.DOCKER_MANIFEST, contents.DOCKER_LIST))


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
            # Not every registry lets go of an upload; one that keeps it forgets it by itself.
            self._login = Login(self._transport, self._reference, "pull,push,delete")
            with contextlib.suppress(RegistryError, RetriableError):
                self._transport.send("DELETE", session)

    def find(self, selector: str) -> Manifest | None:
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
        manifest = Manifest(data, _stated_type(data) or media_type)
        stated = response.headers.get("Docker-Content-Digest", manifest.digest)
        if stated.startswith("sha256:"):
            check_manifest(manifest, stated, str(self))
        return check_manifest(manifest, selector, str(self))

    def put_blob(self, blob: Blob, report: Report, mount_from: str | None = None) -> None:
        """Upload `blob` unless the registry has it."""
        uploads = f"{self._transport.prefix}://{self._container.upload_blob_url()}"
        address = f"{self._transport.prefix}://{self._container.get_blob_url(blob.descriptor.digest)}"
        if mount_from:
            self._login.add_source(mount_from)
        try:
            upload(self._transport, (uploads, address), blob, report, mount_from)
        except RegistryError:
            if not mount_from:
                raise
            # We may not read the other repository, or not both at once: push as if it were not there.
            self._login = Login(self._transport, self._reference, "pull,push")
            upload(self._transport, (uploads, address), blob, report, None)

    def put_manifest(self, manifest: Manifest, selector: str) -> None:
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
            if again:  # what an earlier run left may be to blame
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
            log.warning("%s: the registry did not let us delete tag %s; delete it by hand", self, tag)
        return deleted

    def _continue(self, descriptor: Descriptor, part: Path, report: Report) -> str:
        """Append what is missing to `part`; return the hexadecimal digest of the whole."""
        with disk_errors(part, descriptor.size), part.open("a+b") as file:
            sha = hashlib.sha256()
            file.seek(0)
            while chunk := file.read(READ_BYTES):
                sha.update(chunk)
            have = file.tell()
            if have < descriptor.size:
                response = self._ask_from(descriptor, have)
                if have and not first_byte(response, have):  # it sends everything
                    file.truncate(0)
                    have, sha = 0, hashlib.sha256()
                report(have)
                self._receive(response, descriptor.size - have, file, (sha, report))
            else:
                report(have)
        return sha.hexdigest()

    def _ask_from(self, descriptor: Descriptor, start: int) -> requests.Response:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        url = f"{self._transport.prefix}://{self._container.get_blob_url(descriptor.digest)}"
        response = self._transport.send("GET", url, headers=headers, stream=True)
        raise_if_busy(response)
        if first_byte(response, start) is not None:
            return response
        if response.status_code == 206:
            raise RetriableError("the registry sent another range than asked for")
        if response.status_code == 404:
            raise RegistryError(
                f"{self}: blob {descriptor.digest} is missing in the registry; push the image again"
            )
        raise unexpected(response, f"{self}: downloading {descriptor.digest}")

    def _receive(self, response: requests.Response, left: int, file: Any, sinks: tuple[Any, Report]) -> None:
        """Write the body to `file`, hashing and reporting it; RetriableError when it ends early."""
        sha, report = sinks
        try:
            for chunk in response.iter_content(READ_BYTES):
                left -= len(chunk)
                if left < 0:
                    raise RegistryError(
                        f"{self}: a blob is longer than the manifest says; push the image again"
                    )
                file.write(chunk)
                sha.update(chunk)
                report(len(chunk))
        except requests.exceptions.RequestException as error:
            file.flush()
            report(-file.tell())
            raise RetriableError(f"connection lost in the middle ({type(error).__name__})") from None
        finally:
            response.close()
        if left:
            file.flush()
            report(-file.tell())
            raise RetriableError("connection closed in the middle")

    def _request(self, method: str, address: str, **options: Any) -> requests.Response:
        return self._transport.do_request(f"{self._transport.prefix}://{address}", method, **options)


def _stated_type(data: bytes) -> str:
    try:
        return str(json.loads(data).get("mediaType") or "")
    except (ValueError, AttributeError):
        return ""
