"""Downloads one blob from a registry: continued where it stopped, and checked by its digest.

The bytes are taken as they are stored: a `Content-Encoding` that a front adds to .tar.gz files is no
encoding of the transfer. Does not know what a blob holds. Start at `BlobDownload.to`.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import requests

from runtime.errors import RegistryError
from runtime.files import disk_errors
from runtime.net import RetriableError, first_byte, part_of
from runtime.oci.blobs import READ_BYTES, Descriptor
from runtime.oci.responses import raise_if_busy, unexpected
from runtime.oci.store import Report
from runtime.oci.transport import Outgoing, Transport

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlobDownload:
    """A blob at an address of a registry."""

    transport: Transport
    url: str
    descriptor: Descriptor
    where: str
    """The repository, for messages."""

    def to(self, path: Path, report: Report) -> None:
        """Write the verified bytes to `path` by way of `part_of(path)`, which a later try continues."""
        part = part_of(path)
        for again in (True, False):
            sha = self._complete(part, report)
            if f"sha256:{sha}" == self.descriptor.digest:
                part.replace(path)
                return
            part.unlink(missing_ok=True)
            report(-self.descriptor.size)
            if again:  # the bytes of an earlier run may be the damaged ones
                log.warning(
                    "%s: blob %s arrived damaged; downloading it once more",
                    self.where,
                    self.descriptor.digest,
                )
        raise RegistryError(
            f"{self.where}: blob {self.descriptor.digest} has other bytes in the registry;"
            " push the image again"
        )

    def _complete(self, part: Path, report: Report) -> str:
        """Download until `part` has all bytes; return the hexadecimal digest of the whole."""
        retries = self.transport.retries(f"{self.where}: download of {self.descriptor.digest[:19]}")
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                return self._continue(part, report)
            except RetriableError as error:
                if part.exists() and part.stat().st_size > before:
                    retries.progressed()
                retries.failed(error)

    def _continue(self, part: Path, report: Report) -> str:
        """Append the missing bytes to `part`; return the hexadecimal digest of the whole."""
        with disk_errors(part, self.descriptor.size), part.open("a+b") as file:
            arrived = _ArrivedBytes(file, report)
            if arrived.size < self.descriptor.size:
                response = self._request_from(arrived.size)
                if arrived.size and not first_byte(response, arrived.size):  # the registry sends everything
                    arrived.discard()
                report(arrived.size)
                self._receive(response, arrived)
            else:
                report(arrived.size)
        return arrived.sha256

    def _request_from(self, start: int) -> requests.Response:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        response = self.transport.send(Outgoing("GET", self.url, headers, stream=True))
        raise_if_busy(response)
        if first_byte(response, start) is not None:
            return response
        if response.status_code == 206:
            raise RetriableError("the registry sent another range than requested")
        if response.status_code == 404:
            raise RegistryError(
                f"{self.where}: blob {self.descriptor.digest} is missing in the registry;"
                " push the image again"
            )
        raise unexpected(response, f"{self.where}: downloading {self.descriptor.digest}")

    def _receive(self, response: requests.Response, arrived: "_ArrivedBytes") -> None:
        """Take in the body until all bytes are there; RetriableError when it ends before."""
        size = self.descriptor.size
        response.raw.headers.pop("Content-Encoding", None)  # the digest is of the bytes as they are stored
        try:
            for chunk in response.iter_content(READ_BYTES):
                if arrived.size + len(chunk) > size:
                    raise RegistryError(
                        f"{self.where}: blob {self.descriptor.digest} is longer than the {size} bytes of the"
                        " manifest; push the image again"
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
