"""HTTP mechanics that the clients here share: retries, downloads that resume, event streams.

Works on httpx; `Retries` and `first_byte` also serve the registry client, which sends through oras' session.
Does not know what is fetched or why. Start at `Retries`, `Download` and `events`.
"""

import ipaddress
import logging
import math
import random
import re
import shutil
import ssl
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from runtime import addresses, content_codings
from runtime.errors import CapacityError, DataError, StoppedError, TransientError
from runtime.files import disk_errors, write_atomic

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

RETRIED = frozenset({408, 425, 429, *range(500, 600)} - {501, 505, 507, 511})
"""Statuses after which the same request may succeed: proxies have their own above 511 (520, 524).

Not implemented, HTTP version, storage full and network login stay as they are.
"""
LONGEST_WAIT_S = 30.0
"""The waits between tries double up to this."""
LONGEST_RETRY_AFTER_S = 300.0
"""Longest Retry-After that is waited for: the window of the Hugging Face hub's rate limits."""


class Response(Protocol):
    """The part of a response that httpx and requests have in common."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...


class RetriableError(Exception):
    """A request failed in a way that sending it again may mend; the server may have carried it out."""

    def __init__(self, reason: str, retry_after_s: float | None = None):
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        """The wait that the server requested; None when it requested none."""


class Retries:
    """Counts failures in a row, and waits between them.

    The waits double from `backoff_s` up to LONGEST_WAIT_S, with jitter so that ranks and pods do not come
    back in step. A Retry-After is waited for instead, and a little longer for the same reason.
    """

    def __init__(
        self,
        what: str,
        *,
        attempts: int,
        backoff_s: float,
        deadline: float = math.inf,
        sleep: Callable[[float], object] | None = None,
    ):
        self._what, self._attempts, self._backoff_s = what, attempts, backoff_s
        self._deadline = deadline
        """`time.monotonic()` after which no try begins."""
        self._sleep = sleep or time.sleep
        self._failures = 0

    def progressed(self) -> None:
        """Forget the failures so far."""
        self._failures = 0

    def failed(self, error: RetriableError) -> None:
        """Wait before the next try; TransientError when there is none left or the wait would be too long."""
        self._failures += 1
        if self._failures >= self._attempts:
            raise TransientError(
                f"{self._what}: gave up after {self._failures} tries, the last: {error}; try again later"
            ) from None
        if error.retry_after_s is None:
            wait_s = min(LONGEST_WAIT_S, self._backoff_s * 2 ** (self._failures - 1))
            wait_s *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        else:
            wait_s = error.retry_after_s * random.uniform(1.0, 1.2)  # noqa: S311
        if (error.retry_after_s or 0) > LONGEST_RETRY_AFTER_S or time.monotonic() + wait_s > self._deadline:
            raise TransientError(
                f"{self._what}: {error}; the next try would be in {wait_s:.0f} s, too late: try again then"
            ) from None
        log.warning(
            "%s: %s; trying again in %.1f s (try %s of %s)",
            self._what,
            error,
            wait_s,
            self._failures + 1,
            self._attempts,
        )
        self._sleep(wait_s)


def retry_after_s(value: str | None) -> float | None:
    """Return the wait of a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None if it has none."""
    value = (value or "").strip()
    if value.isdecimal() and value.isascii():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without its zone
        return None


def raise_if_retriable(response: Response, detail: str = "") -> None:
    """Raise RetriableError for a status that asks to try again; `detail` is added to its message."""
    if response.status_code in RETRIED:
        wait_s = retry_after_s(response.headers.get("Retry-After"))
        raise RetriableError(f"answered {response.status_code}{detail}", wait_s)


def untrusted(error: BaseException) -> str | None:
    """Return why a certificate was not trusted where that is what `error` is about: no try will mend it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        cause = cause.__cause__ or cause.__context__
    return None


def proxy_for(url: str) -> str | None:
    """Return the environment's proxy for `url`; None without one, and for this machine itself.

    Link-local addresses, where the node's own services are, are not for a proxy either.
    """
    import requests.utils

    host = urlsplit(url).hostname or ""
    address = ipaddress.ip_address(addresses.literal(host) or "::")
    if host.removesuffix(".") == "localhost" or address.is_loopback or address.is_link_local:
        return None
    proxies = requests.utils.get_environ_proxies(url)
    return requests.utils.select_proxy(url, proxies) or None


def shown_proxy(proxy: str | None) -> str:
    """Return the address of a proxy without its user and password."""
    return (proxy or "").rpartition("@")[2].removeprefix("http://").rstrip("/") or "of the environment"


def part_of(path: Path) -> Path:
    """Return the file that holds a download to `path` until it is complete."""
    return path.with_name(f"{path.name}.part")


def first_byte(response: Response, offset: int) -> int | None:
    """Return the offset in the file of the body's first byte, of a request for the bytes from `offset` on.

    None when the response is neither the file (200) nor the requested range (206).
    """
    if response.status_code == 200:
        return 0
    partial = response.status_code == 206 and offset > 0
    content_range = response.headers.get("Content-Range", "")
    return offset if partial and content_range.startswith(f"bytes {offset}-") else None


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """When a download is tried again and when it is given up. One home for these defaults."""

    attempts: int = 6
    """Tries without progress before giving up."""
    backoff_s: float = 1.0
    """First wait between tries; it doubles each time, to at most LONGEST_WAIT_S."""
    stall_s: float = 30.0
    """Longest silence of a server."""
    deadline_s: float = 6 * 3600
    """Longest time for one file, retries included."""
    rate_bytes_s: float = 1024.0
    """Least speed, over `stall_s`: a server that drips is as good as silent."""


DEFAULT_LIMITS = DownloadLimits()
"""One object for functions' defaults."""

Get = Callable[[dict[str, str]], AbstractContextManager["httpx.Response"]]
"""Sends the GET request with these headers added; its errors are httpx'."""


class Counted(Protocol):
    """Counts the bytes of all downloads together against a limit; raises a Failure beyond it."""

    def add(self, count: int, where: str) -> None:
        """Count `count` more bytes of `where`."""
        ...

    def expect(self, count: int, where: str) -> None:
        """Check that `count` more bytes are allowed, without counting them."""
        ...


class Download:
    """A download into `part_of(path)`, which every try continues where the last one stopped.

    The server's validator (ETag or Last-Modified) is kept beside it and sent as If-Range, so that a file
    that changed in between is sent from its start (RFC 9110, 13.1.5). What comes in a content coding is kept
    as it was sent, since ranges are of that, until `decode`. The caller checks `part`, and calls `finish`.
    """

    def __init__(
        self, path: Path, what: str, *, limits: DownloadLimits, stop: threading.Event, counted: Counted
    ):
        self.path, self.part = path, part_of(path)
        self._what, self._limits, self._stop, self._counted = what, limits, stop, counted
        self._deadline = time.monotonic() + limits.deadline_s
        self._most = 0
        """The most bytes that `part` had: those are counted."""

    @property
    def validator_file(self) -> Path:
        """Where the server's validator, and a line with the content codings, are kept meanwhile."""
        return self.path.with_name(f".{self.path.name}.validator")

    def run(self, get: Get) -> None:
        """Send requests until `part` is complete; a try that received bytes resets the count of failures.

        Raises TransientError when tries or time run out, DataError when the answer is not the file,
        CapacityError without space for it, StoppedError when `stop` is set.
        """
        import httpx

        retries = Retries(
            self._what,
            attempts=self._limits.attempts,
            backoff_s=self._limits.backoff_s,
            deadline=self._deadline,
            sleep=self._sleep,
        )
        while True:
            have, began = self._received(), time.monotonic()
            try:
                self._attempt(get, have)
            except (httpx.TransportError, httpx.StreamError, RetriableError) as error:
                least = self._limits.rate_bytes_s * (time.monotonic() - began)
                if self._received() - have > least:
                    retries.progressed()
                retries.failed(self._retriable(error))
            else:
                return

    def _retriable(self, error: Exception) -> RetriableError:
        """Return `error` as one after which a request is sent again; DataError where none would help."""
        if isinstance(error, RetriableError):
            return error
        if (distrust := untrusted(error)) is not None:
            raise DataError(
                f"{self._what}: its certificate is not trusted ({distrust}); set SSL_CERT_FILE to the "
                "certificates of its CA, or correct the host name"
            ) from None
        return RetriableError(str(error) or type(error).__name__)

    @property
    def codings(self) -> tuple[str, ...]:
        """The content codings that `part` is in."""
        return content_codings.names(self._kept()[1])

    def decode(self) -> None:
        """Take the codings off `part`; DataError where it is not in them."""
        plain = self.part.with_name(f".{self.path.name}.decoded.part")
        try:
            content_codings.decode(self.part, plain, self.codings, lambda n: self._counted.add(n, self._what))
            plain.replace(self.part)
        except DataError as error:
            self.part.unlink()
            raise DataError(str(error) if self._what in str(error) else f"{self._what}: {error}") from None
        finally:
            plain.unlink(missing_ok=True)
        self.validator_file.unlink()

    def finish(self) -> None:
        """Rename the checked file to `path`."""
        self.part.replace(self.path)
        self.validator_file.unlink(missing_ok=True)

    def _received(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _kept(self) -> tuple[str, str]:
        """Return the validator and the Content-Encoding of what `part` holds."""
        text = self.validator_file.read_text(encoding="utf-8") if self.validator_file.exists() else ""
        validator, _, coding = text.partition("\n")
        return validator, coding

    def _sleep(self, wait_s: float) -> None:
        if self._stop.wait(wait_s):
            raise StoppedError(f"{self._what}: the download was stopped") from None

    def _attempt(self, get: Get, have: int) -> None:
        """Make one request for the missing bytes and append them to `part`."""
        validator, coding = self._kept()
        headers = {"Accept-Encoding": "identity"}
        offset = have if validator else 0
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
        with get(headers) as response:
            if offset and _is_all(response, offset):
                return
            start = self._start(response, offset, coding)
            self._check_length(response, start)
            fresh = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if fresh.startswith("W/"):  # a weak tag does not promise the same bytes
                fresh = ""
            if not start:
                write_atomic(self.validator_file, f"{fresh}\n{response.headers.get('Content-Encoding', '')}")
            self._receive(response, start)

    def _start(self, response: "httpx.Response", offset: int, coding: str) -> int:
        """Return the offset of the body's first byte; raises unless it is the file or the rest of it."""
        raise_if_retriable(response)
        start = first_byte(response, offset)
        sent = response.headers.get("Content-Encoding", "")
        if start is not None and (not start or content_codings.names(sent) == content_codings.names(coding)):
            try:
                content_codings.names(sent)
            except DataError as error:
                raise DataError(f"{self._what}: {error}") from None
            return start
        if offset and response.status_code in (206, 416):
            self.part.unlink(missing_ok=True)
            content_range = response.headers.get("Content-Range", "")
            raise RetriableError(
                f"answered {response.status_code} {content_range!r} to the range from {offset}; starting over"
            )
        raise DataError(f"{self._what}: answered {response.status_code}, expected the file")

    def _check_length(self, response: "httpx.Response", start: int) -> None:
        """Check what the server says it will send against the limit and the free space."""
        text = response.headers.get("Content-Length", "")
        length = int(text) if text.isdecimal() and text.isascii() else 0
        free = shutil.disk_usage(self.part.parent).free
        if length > free:
            raise CapacityError(
                f"{self.part.parent}: {length} bytes needed for {self.path.name}, {free} are free"
            )
        self._counted.expect(max(0, start + length - self._most), self._what)

    def _receive(self, response: "httpx.Response", start: int) -> None:
        pace = _Pace(self._what, self._limits)
        size = start
        self._count(size)
        with disk_errors(self.part), self.part.open("ab" if start else "wb") as stream:
            for chunk in response.iter_raw():
                size += len(chunk)
                self._count(size)
                stream.write(chunk)
                if self._stop.is_set():
                    raise StoppedError(f"{self._what}: the download was stopped")
                if time.monotonic() > self._deadline:
                    raise TransientError(f"{self._what}: not complete after {self._limits.deadline_s:.0f} s")
                pace.count(len(chunk))

    def _count(self, size: int) -> None:
        """Count what `part` has grown by, of `size` bytes now."""
        if size > self._most:
            self._counted.add(size - self._most, self._what)
            self._most = size


def _is_all(response: Response, offset: int) -> bool:
    """Whether a server says, to the request for a range, that the file ends where the range begins."""
    return response.status_code == 416 and response.headers.get("Content-Range", "") == f"bytes */{offset}"


class _Pace:
    """Raises TransientError when a server sends too slowly."""

    def __init__(self, what: str, limits: DownloadLimits):
        self._what, self._limits = what, limits
        self._since, self._bytes = time.monotonic(), 0

    def count(self, received: int) -> None:
        self._bytes += received
        seconds = time.monotonic() - self._since
        if seconds < self._limits.stall_s:
            return
        rate, least = self._bytes / seconds, self._limits.rate_bytes_s
        if rate < least:
            raise TransientError(f"{self._what}: {rate:.0f} bytes/s, less than {least:.0f}")
        self._since, self._bytes = time.monotonic(), 0


_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"
LARGEST_EVENT = 8 << 20
"""Bytes of a line, and of an event's lines together; the largest that servers send repeats a whole answer."""


class EventReader:
    """Reads a stream of server-sent events from chunks of any size (WHATWG HTML, 9.2.6).

    Lines end at CR, LF or CRLF only: JSON may contain U+2028 and U+0085, where `str.splitlines` breaks too.
    Types, ids and reconnection times of events are not used here and are skipped.
    """

    def __init__(self, *, largest: int = LARGEST_EVENT) -> None:
        self._largest = largest
        self._rest = bytearray()
        """The beginning of a line whose end has not arrived yet."""
        self._after_cr = False
        """The last chunk ended with a CR: a LF at the start of the next belongs to it."""
        self._begun = False
        self._data: list[str] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> list[str]:
        """Return the data of the events that `chunk` completes; an event that is cut off is dropped.

        Raises TransientError for a line or event of more than `largest` bytes.
        """
        if not chunk:
            return []
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        first, *others = _LINE_END.split(chunk)
        self._rest += first  # a line in small chunks is searched and copied once
        self._check(len(self._rest))
        if not others:
            return []
        lines = (bytes(self._rest), *others[:-1])
        self._rest = bytearray(others[-1])
        return [data for line in lines if (data := self._line(line)) is not None]

    def _line(self, line: bytes) -> str | None:
        """Process one line; return the event's data when the line is empty and ends an event with data."""
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            event = "\n".join(self._data) if self._data else None
            self._data.clear()
            self._data_bytes = 0
            return event
        field, _, value = line.decode("utf-8", errors="replace").partition(":")
        if field == "data":  # a comment's field is empty
            self._data_bytes += len(line)
            self._check(self._data_bytes)
            self._data.append(value.removeprefix(" "))
        return None

    def _check(self, size: int) -> None:
        if size > self._largest:
            raise TransientError(f"an event of the server's stream is larger than {self._largest} bytes")


def events(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the data of each event in a body that arrives in `chunks`."""
    reader = EventReader()
    for chunk in chunks:
        yield from reader.feed(chunk)


async def async_events(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield the data of each event in a body that arrives in `chunks`."""
    reader = EventReader()
    async for chunk in chunks:
        for event in reader.feed(chunk):
            yield event
