"""Sends one blob to a registry in chunks, and resumes after any interruption.

After any doubt (lost reply, 416, expired token, 5xx) the registry is queried for the bytes it has; an
upload it no longer knows is restarted. Chunks are streamed from disk, never held in memory.
Start at `upload`.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import requests

from runtime.errors import RegistryError
from runtime.net import RetriableError, Retries
from runtime.oci.blobs import Blob, Reader
from runtime.oci.store import Report
from runtime.oci.transport import Transport, raise_if_busy, unexpected
from runtime.oci.upload_sessions import UploadSessions

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
"""Each PATCH has a fixed cost for the registry, so large ones are faster; they are streamed."""
AZURE_CHUNK_BYTES = 16 << 20
"""Azure's registry answers 413 to bodies above about 20 MB."""
MONOLITHIC_BYTES = 4 << 20
"""Blobs up to this size go in one PUT."""
_SMALLEST_CHUNK_BYTES = 1 << 18
_MAX_SESSIONS = 4
_RANGE = re.compile(r"(?:bytes=)?(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class BlobUrls:
    """Addresses of one blob in a repository."""

    uploads: str
    """Where upload sessions are started."""
    blob: str


@dataclass(slots=True)
class _Upload:
    """The state of one upload session."""

    transport: Transport
    urls: BlobUrls
    blob: Blob
    report: Report
    chunk: int
    retries: Retries = field(init=False)
    session: str = ""
    """Where the next request of the session goes; every response may change it."""
    offset: int = 0
    """Bytes that the registry has received."""
    sessions: int = 0
    open_sessions: UploadSessions = field(init=False)
    """Keeps `session` for the process that resumes after this one was killed."""

    def __post_init__(self) -> None:
        self.open_sessions = UploadSessions(self.transport.access.sessions)
        self.retries = self.transport.retries(f"upload of {self.blob.descriptor.digest[:19]}")

    @property
    def size(self) -> int:
        return self.blob.descriptor.size


def upload(
    transport: Transport, blob: Blob, *, urls: BlobUrls, report: Report, source: str | None = None
) -> None:
    """Send `blob` unless the registry has it.

    source: another repository of the registry from which it may be mounted.
    """
    azure = ".azurecr." in transport.host
    state = _Upload(transport, urls, blob, report, AZURE_CHUNK_BYTES if azure else CHUNK_BYTES)
    if _exists(state):
        report(blob.descriptor.size)
        return
    if not _continue(state) and _start(state, source):
        report(blob.descriptor.size)
        return
    while True:
        try:
            if _step(state):
                return
        except RetriableError as error:
            state.retries.failed(error)
            before = state.offset
            if _resynchronise(state):
                return
            if state.offset > before:
                state.retries.progressed()


def _continue(state: _Upload) -> bool:
    """Resume the upload of a killed process; False when there is none or it has ended."""
    session = state.open_sessions.take(state.urls.uploads, state.blob.descriptor.digest)
    if session is None:
        return False
    response = state.transport.do_request(session, "GET")
    if response.status_code not in {200, 204}:
        return False
    state.session = session
    _update_session(state, response)
    _set_offset(state, _bytes_received(response, 0))
    log.info("upload of %s resumes at byte %s", state.blob.descriptor.digest[:19], state.offset)
    return True


def _start(state: _Upload, source: str | None = None) -> bool:
    """Start a session; True when the registry mounted the blob instead."""
    state.sessions += 1
    if state.sessions > _MAX_SESSIONS:
        raise RegistryError(
            f"{state.transport.host}: lost the upload of {state.blob.descriptor.digest} {_MAX_SESSIONS} times"
        )
    query = f"?{urlencode({'mount': state.blob.descriptor.digest, 'from': source})}" if source else ""
    response = state.transport.do_request(state.urls.uploads + query, "POST", headers={"Content-Length": "0"})
    if response.status_code == 201 and source:
        return True
    if response.status_code != 202 or not response.headers.get("Location"):
        raise unexpected(response, f"{state.transport.host}: starting an upload")
    least = response.headers.get("OCI-Chunk-Min-Length", "")
    state.chunk = max(state.chunk, int(least)) if least.isdigit() else state.chunk
    state.report(-state.offset)
    state.offset = 0
    _update_session(state, response)
    return False


def _step(state: _Upload) -> bool:
    """Send one chunk, or close the upload; True when the blob is stored."""
    monolithic = state.offset == 0 and state.size <= min(MONOLITHIC_BYTES, state.chunk)
    if monolithic or state.offset >= state.size:
        return _finish(state, monolithic)
    start, end = state.offset, min(state.size, state.offset + state.chunk)
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(end - start),
        "Content-Range": f"{start}-{end - 1}",
    }
    body = _body(state, start, end)
    response = state.transport.send("PATCH", state.session, headers=headers, body=body)
    if response.status_code == 202:
        state.retries.progressed()
        _update_session(state, response)
        _set_offset(state, _bytes_received(response, end))
        return False
    _recover(state, response, "a chunk")
    return False


def _finish(state: _Upload, monolithic: bool) -> bool:
    digest = state.blob.descriptor.digest
    parts = urlsplit(state.session)
    url = urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query, True), ("digest", digest)])))
    length = state.size if monolithic else 0
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
    body = _body(state, 0, length) if length else None
    response = state.transport.send("PUT", url, headers=headers, body=body)
    if response.status_code in {201, 204}:
        stored = response.headers.get("Docker-Content-Digest", digest)
        if stored != digest:
            raise RegistryError(f"{state.transport.host}: stored {stored} instead of {digest}; push again")
        _set_offset(state, state.size)
        state.open_sessions.forget(state.urls.uploads, digest)
        return True
    if response.status_code == 400:  # the registry has other bytes than were sent: begin again
        if state.sessions > 1:
            raise unexpected(response, f"{state.transport.host}: closing the upload of {digest}")
        _start(state)
        return False
    _recover(state, response, "the end of an upload")
    return False


def _recover(state: _Upload, response: requests.Response, what: str) -> None:
    """Prepare the next step after a failed one; raises when none is possible."""
    raise_if_busy(response)
    if response.status_code == 404:
        if not _exists(state):
            _start(state)
            return
        raise RetriableError("the upload had ended already")
    if response.status_code == 413 and state.chunk > _SMALLEST_CHUNK_BYTES:
        state.chunk = min(state.chunk, state.size) // 2
        _resynchronise(state)
        return
    if response.status_code == 416:
        raise RetriableError("416, the registry is at another offset")
    raise unexpected(response, f"{state.transport.host}: {what}")


def _resynchronise(state: _Upload) -> bool:
    """Ask the registry how many bytes it has, and continue there; True when it has the complete blob."""
    response = state.transport.do_request(state.session, "GET")
    if response.status_code in {200, 204} and response.headers.get("Range"):
        _update_session(state, response)
        _set_offset(state, _bytes_received(response, 0))
        return False
    if _exists(state):
        _set_offset(state, state.size)
        return True
    if response.status_code in {200, 204}:
        _update_session(state, response)
        _set_offset(state, 0)
        return False
    return _start(state)


def _exists(state: _Upload) -> bool:
    response = state.transport.do_request(state.urls.blob, "HEAD")
    if response.status_code not in {200, 404}:
        raise unexpected(response, f"{state.transport.host}: looking for a blob")
    return bool(response.status_code == 200)


def _update_session(state: _Upload, response: requests.Response) -> None:
    state.session = urljoin(state.urls.uploads, response.headers.get("Location") or state.session)
    if state.size > MONOLITHIC_BYTES:
        state.open_sessions.keep(state.urls.uploads, state.blob.descriptor.digest, state.session)


def _set_offset(state: _Upload, offset: int) -> None:
    state.report(offset - state.offset)
    state.offset = offset


def _bytes_received(response: requests.Response, expected: int) -> int:
    """Return how many bytes the registry reports; "0-0" means none."""
    found = _RANGE.fullmatch(response.headers.get("Range", ""))
    if found is None:
        return expected
    last = int(found[2])
    return last + 1 if last else 0


def _body(state: _Upload, start: int, end: int) -> Any:
    return lambda: _ChunkBody(state.blob.open(start), end - start, state.report)


class _ChunkBody:
    """The next `length` bytes of a reader, as a body with a known length."""

    def __init__(self, reader: Reader, length: int, report: Report):
        self._reader, self._left, self._length, self._report = reader, length, length, report

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        self._report(0)  # 0: counted when the registry confirms it; raises when the push was cancelled
        data = self._reader.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._reader.close()
