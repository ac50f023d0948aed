"""Sends one blob to a registry, as Docker and skopeo do: POST, one streamed PATCH, PUT.

Chunks (a Content-Range each) are for registries that take no large body, and for blobs so large that losing
one PATCH would cost much, as long as the registry handles them. After any doubt (lost reply, 416, expired
token, 5xx) the registry is queried for the bytes it has; an upload it no longer knows is restarted. Bodies
are streamed from disk, never held in memory. Start at `upload`.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit

import requests

from runtime.errors import RegistryError, TransientError
from runtime.net import RetriableError, Retries
from runtime.oci.blobs import Blob, from_bytes
from runtime.oci.responses import explain, raise_if_busy, read_body, succeeded, unexpected
from runtime.oci.store import Report
from runtime.oci.transport import Outgoing, Transport
from runtime.oci.upload_sessions import UploadSessions

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
"""Each PATCH has a fixed cost for the registry, so large ones are faster; they are streamed."""
AZURE_CHUNK_BYTES = 16 << 20
"""Azure's registry answers 413 to bodies above about 20 MB."""
CHUNKED_ABOVE_BYTES = 512 << 20
"""Larger blobs are sent in chunks where the registry handles them: a broken connection costs one chunk."""
REHEARSAL_BYTES = 5 << 20
"""Above the 4 MiB that one registry allows a chunk, and at least the 5 MiB that another wants in one."""
_REMEMBERED_ABOVE_BYTES = 4 << 20
_SMALLEST_CHUNK_BYTES = 1 << 18
_STORED_BYTES_S = 10e6
"""How fast a registry at least moves a complete blob into its storage before it answers the PUT."""
_MOST_LOST = 4
_MOST_DOUBTS = 2
_LOSSES_BEFORE_CHUNKS = 2
_RANGE = re.compile(r"(?:bytes=)?(\d+)-(\d+)")
_AZURE = re.compile(r".*\.azurecr\.(?:io|cn|us)\.?(?::\d+)?", re.IGNORECASE)
_NO_CHUNKS = frozenset({400, 404, 405, 411, 415, 416, 501})
"""Refusals of a Content-Range by registries that only take whole blobs."""


@dataclass(frozen=True, slots=True)
class BlobUrls:
    """Addresses of one blob in a repository."""

    uploads: str
    """Where upload sessions are started."""
    blob: str


@dataclass(slots=True)
class _Upload:
    """The state of one blob's upload."""

    transport: Transport
    urls: BlobUrls
    blob: Blob
    report: Report
    open_sessions: UploadSessions
    """Keeps `session` for the process that resumes after this one was killed."""
    chunk: int | None = None
    """Bytes of one PATCH; None sends all that is left in one."""
    only_chunks: bool = False
    """The registry takes nothing larger; otherwise a refused chunk means that it takes no chunks."""
    whole: bool = False
    """The registry knows no PATCH: everything goes with the PUT."""
    session: str = ""
    """Where the next request of the session goes; every response may change it."""
    offset: int = 0
    """Bytes that the registry has received."""
    counted: int = 0
    """Bytes that were reported: `offset`, and those on their way."""
    least: int = 0
    """Bytes that a chunk must have unless it is the last (OCI-Chunk-Min-Length)."""
    chunks: int = 0
    """Chunks of this session that the registry took."""
    lost: int = 0
    """Sessions that the registry forgot."""
    losses: int = 0
    """Connections that broke in a PATCH without any progress."""
    doubts: int = 0
    """Offsets in a row that the registry named and then refused."""
    mismatched: bool = False
    """The registry had other bytes than were sent once; the next time ends the push."""
    resumable: bool = True
    """Whether an upload can go on in the middle, where the registry says it is."""
    retries: Retries = field(init=False)

    def __post_init__(self) -> None:
        self.retries = self.transport.retries(f"upload of {self.blob.descriptor.digest[:19]}")
        if _AZURE.fullmatch(self.transport.host):
            self.chunk, self.only_chunks = AZURE_CHUNK_BYTES, True
        elif self.size > CHUNKED_ABOVE_BYTES:
            self.chunk = CHUNK_BYTES

    @property
    def size(self) -> int:
        return self.blob.descriptor.size

    @property
    def trusts_chunks(self) -> bool:
        """Whether chunks have worked in this session, or nothing else does."""
        return self.only_chunks or self.chunks > 1

    def count(self, sent: int) -> None:
        """Report bytes as they are sent."""
        self.report(sent)
        self.counted += sent

    def settle(self, offset: int) -> None:
        """Set what the registry has, and correct what was reported."""
        self.count(offset - self.counted)
        self.offset = offset


def upload(
    transport: Transport, blob: Blob, *, urls: BlobUrls, report: Report, source: str | None = None
) -> None:
    """Send `blob` unless the registry has it.

    source: another repository of the registry from which it may be mounted.
    """
    open_sessions = UploadSessions(transport.access.sessions)
    state = _Upload(transport, urls, blob, report, open_sessions)
    if _exists(state) or (not _continue(state) and _start(state, source)):
        report(blob.descriptor.size)
        return
    _run(state, _finish)
    open_sessions.forget(urls.uploads, blob.descriptor.digest)


def rehearse(transport: Transport, uploads: str) -> str:
    """Send a blob of more than 4 MiB the way `upload` does; return the session, for the caller to cancel."""
    blob = from_bytes(bytes(REHEARSAL_BYTES), "application/octet-stream")
    state = _Upload(transport, BlobUrls(uploads, ""), blob, lambda count: None, UploadSessions(None))
    _start(state)
    _run(state, lambda state: True)
    return state.session


def _run(state: _Upload, finish: Callable[[_Upload], bool]) -> None:
    """Send what the registry has not got, then `finish`, as often as it takes."""
    while True:
        try:
            if state.offset < state.size and not state.whole:
                _patch(state)
            elif finish(state):
                return
        except RetriableError as error:
            state.settle(state.offset)
            state.retries.failed(error)
            if _resynchronise(state):
                return


def _continue(state: _Upload) -> bool:
    """Resume the upload of a killed process; False when there is none or it has ended."""
    session = state.open_sessions.take(state.urls.uploads, state.blob.descriptor.digest)
    if session is None:
        return False
    state.session = session
    if not _ask(state):
        return False
    log.info("upload of %s resumes at byte %s", state.blob.descriptor.digest[:19], state.offset)
    return True


def _start(state: _Upload, source: str | None = None) -> bool:
    """Start a session; True when the registry mounted the blob instead."""
    state.settle(0)
    state.chunks, state.doubts = 0, 0
    query = f"?{urlencode({'mount': state.blob.descriptor.digest, 'from': source})}" if source else ""
    response = state.transport.do_request(state.urls.uploads + query, "POST", headers={"Content-Length": "0"})
    if response.status_code == 201 and source:
        return True
    if not succeeded(response) or not response.headers.get("Location"):
        raise unexpected(response, f"{state.transport.host}: starting an upload")
    least = response.headers.get("OCI-Chunk-Min-Length", "")
    state.least = int(least) if least.isdecimal() and len(least) < 12 else 0
    _follow(state, response)
    return False


def _patch(state: _Upload) -> None:
    """Send what is left, or one chunk of it."""
    start = state.offset
    chunk = state.size if state.chunk is None else state.chunk
    if state.chunk is not None and not state.only_chunks and not state.chunks:
        chunk = min(chunk, REHEARSAL_BYTES)  # a registry that takes no chunks should say so early
    end = min(state.size, start + max(chunk, state.least))
    ranged = state.chunk is not None or start > 0
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(end - start)}
    if ranged:
        headers["Content-Range"] = f"{start}-{end - 1}"
    body, patience_s = _body(state, start, end), (end - start) / _STORED_BYTES_S
    request = Outgoing("PATCH", state.session, headers, body, patience_s=patience_s)
    try:
        response = state.transport.send(request)
    except RetriableError:
        state.losses += 1
        raise
    if succeeded(response):
        _accept(state, response, end)
        return
    state.settle(start)
    if ranged and not state.trusts_chunks and response.status_code in _NO_CHUNKS:
        _send_in_one(state, f"answered {response.status_code}{explain(response)}")
    elif response.status_code in {405, 501} and not ranged:
        state.whole, state.resumable = True, False
        _start(state)
    elif response.status_code == 413 or (response.status_code == 416 and _says_too_large(response)):
        _send_less(state, response, end - start)
    else:
        _recover(state, response, "sending a blob")


def _accept(state: _Upload, response: requests.Response, end: int) -> None:
    """Note a PATCH that the registry took; its Range is believed where it advances, else what was sent."""
    start, received = state.offset, _received(response)
    chunked = state.chunk is not None
    of_body = received == end - start  # some registries count the bytes of this body alone
    if chunked and not state.only_chunks and received is not None and received <= start and not of_body:
        # One registry accepts every chunk and keeps only the first.
        _send_in_one(state, f"reports {received} bytes after {end}")
        return
    state.chunks += chunked
    state.losses, state.doubts = 0, 0
    state.retries.progressed()
    _follow(state, response)
    partial = received is not None and start < received < end and not of_body
    state.settle(received if partial and received is not None and state.resumable else end)


def _send_in_one(state: _Upload, reason: str) -> None:
    """Begin anew without chunks."""
    log.info("%s: no chunked uploads (%s); sending the blob in one", state.transport.host, reason)
    state.chunk, state.resumable = None, False  # to go on in the middle needs a Content-Range, too
    _start(state)


def _send_less(state: _Upload, response: requests.Response, sent: int) -> None:
    """Continue in chunks, smaller than the body that was refused."""
    if sent <= _SMALLEST_CHUNK_BYTES:
        raise unexpected(response, f"{state.transport.host}: sending {sent} bytes of a blob")
    state.chunk, state.only_chunks = min(AZURE_CHUNK_BYTES, max(sent // 2, _SMALLEST_CHUNK_BYTES)), True
    log.info("%s: refused a body of %s bytes; sending chunks of %s", state.transport.host, sent, state.chunk)
    if _resynchronise(state):
        raise RetriableError("the upload had ended already")


def _finish(state: _Upload) -> bool:
    """Close the upload; True when the blob is stored."""
    digest = state.blob.descriptor.digest
    parts = urlsplit(state.session)
    query = "&".join(filter(None, (parts.query, urlencode({"digest": digest}))))
    length = state.size if state.whole else 0
    request = Outgoing(
        "PUT",
        urlunsplit(parts._replace(query=query)),
        {"Content-Type": "application/octet-stream", "Content-Length": str(length)},
        _body(state, 0, length) if length else None,
        patience_s=state.size / _STORED_BYTES_S,
    )
    response = state.transport.send(request)
    if succeeded(response):
        stored = response.headers.get("Docker-Content-Digest") or digest
        if stored != digest:
            raise RegistryError(f"{state.transport.host}: stored {stored} instead of {digest}; push again")
        state.settle(state.size)
        return True
    if response.status_code == 400 and not state.mismatched:  # it has other bytes than were sent: begin again
        state.mismatched, state.resumable = True, False
        if not state.only_chunks:
            state.chunk = None
        _start(state)
        return False
    _recover(state, response, f"closing the upload of {digest}")
    return False


def _recover(state: _Upload, response: requests.Response, what: str) -> None:
    """Prepare the next step after a failed one; raises when none is possible."""
    raise_if_busy(response)
    if response.status_code == 404:
        if state.urls.blob and _exists(state):
            raise RetriableError("the upload had ended already")
        state.lost += 1
        if state.lost >= _MOST_LOST:
            raise RegistryError(
                f"{state.transport.host}: lost the upload of {state.blob.descriptor.digest}"
                f" {state.lost} times; push again"
            )
        _start(state)
    elif response.status_code == 416:
        state.doubts += 1
        raise RetriableError(f"416, the registry is at another offset than {state.offset}")
    else:
        raise unexpected(response, f"{state.transport.host}: {what}")


def _resynchronise(state: _Upload) -> bool:
    """Ask the registry how many bytes it has, and continue there; True when it has the complete blob."""
    before = state.offset
    known = state.resumable and state.doubts < _MOST_DOUBTS and _ask(state)
    if known and state.offset > before:
        state.retries.progressed()
        state.losses = 0
    elif state.losses >= _LOSSES_BEFORE_CHUNKS and state.resumable:
        # What breaks the connection may be the size of the body.
        state.chunk = max((state.chunk or 2 * AZURE_CHUNK_BYTES) // 2, _SMALLEST_CHUNK_BYTES)
        state.losses = 0
    if known:
        return False
    if state.urls.blob and _exists(state):
        state.settle(state.size)
        return True
    _start(state)
    return False


def _ask(state: _Upload) -> bool:
    """Continue where the registry says the session is; False when it does not say, or has nothing."""
    try:
        response = state.transport.do_request(state.session, "GET")
    except TransientError:  # for some registries, the answer to a session that is gone
        return False
    received = _received(response)
    if not succeeded(response) or not received or received > state.size:
        return False
    _follow(state, response)
    state.settle(received)
    return True


def _exists(state: _Upload) -> bool:
    """Whether the registry has the blob; one that will not say is sent it."""
    return bool(state.transport.do_request(state.urls.blob, "HEAD").status_code == 200)


def _follow(state: _Upload, response: requests.Response) -> None:
    """Note where the session goes on; relative addresses are relative to the response's."""
    location = response.headers.get("Location")
    if location:
        try:
            state.session = urljoin(response.url, location)
        except ValueError:
            raise RegistryError(f"{state.transport.host}: sent an address that cannot be used") from None
    if state.size > _REMEMBERED_ABOVE_BYTES:
        state.open_sessions.keep(state.urls.uploads, state.blob.descriptor.digest, state.session)


def _received(response: requests.Response) -> int | None:
    """Return how many bytes the registry reports, None when it does not; "0-0" means none."""
    found = _RANGE.fullmatch(response.headers.get("Range", "").strip())
    if found is None:
        return None
    last = int(found[2])
    return last + 1 if last else 0


def _says_too_large(response: requests.Response) -> bool:
    read_body(response, response.url)
    return b"too large" in response.content


def _body(state: _Upload, start: int, end: int) -> Callable[[], Any]:
    return lambda: _Body(state, start, end)


class _Body:
    """Bytes `start` to `end` of a blob, as a body with a known length; what is read counts as sent."""

    def __init__(self, state: _Upload, start: int, end: int):
        state.settle(start)  # this may be another try
        self._state, self._reader = state, state.blob.open(start)
        self._left, self._length = end - start, end - start

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        data = self._reader.read(self._left if size < 0 else min(size, self._left))
        self._state.count(len(data))  # raises when the push was cancelled
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._reader.close()
