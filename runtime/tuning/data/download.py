"""Fetches data files: resumed, verified, and under their final names only when whole.

Does not know what rows are. Start at `fetch`; `download` gets one file, `_attempt` makes one request.
"""

import contextlib
import hashlib
import ipaddress
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pyarrow as pa
import pyarrow.parquet
from pydantic import SecretStr

from runtime import net, oci
from runtime.errors import CapacityError, DataError, StoppedError, TransientError
from runtime.files import held, write_whole
from runtime.oci.access import DEFAULT
from runtime.tuning.data.formats import targets
from runtime.tuning.settings import DataSource

log = logging.getLogger(__name__)

HUB_HOSTS = frozenset({"huggingface.co", "hf.co"})
"""Hosts that the Hugging Face token is sent to; a redirect elsewhere goes without it."""

LOCK = ".fetching"
"""Held in the data folder by who fetches into it."""

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a download is. One home for these defaults."""

    attempts: int = 6
    """Tries without progress before giving up."""
    backoff_s: float = 1.0
    """First wait between tries; it doubles each time, to at most 30 s."""
    stall_s: float = 30.0
    """Longest silence of a server."""
    deadline_s: float = 6 * 3600
    """Longest time for one file, retries included."""
    rate_bytes_s: float = 1024.0
    """Least speed, over `stall_s`: a server that drips is as good as silent."""
    redirects: int = 5
    parallel: int = 4


def fetch(
    source: DataSource,
    *,
    token: SecretStr | None = None,
    policy: Policy = Policy(),
    access: oci.Access = DEFAULT,
) -> None:
    """Bring every file of `source` into its folder; files that are there already are kept.

    Raises DataError for what will not get better (404, HTML, a wrong digest), TransientError for what may.
    """
    if source.image is not None:
        oci.pull(oci.parse(source.image), source.folder / "image", access=access)
        return
    if not source.urls:
        return
    stop = threading.Event()
    downloads = [
        _Download(url, path, token=token, source=source, policy=policy, stop=stop)
        for url, path in zip(dict.fromkeys(source.urls), targets(source), strict=True)
    ]
    source.folder.mkdir(parents=True, exist_ok=True)
    complete = all(download.is_there for download in downloads)
    with contextlib.nullcontext() if complete else _turn(source.folder, policy):
        _run(downloads, policy, stop)


def _run(downloads: "list[_Download]", policy: Policy, stop: threading.Event) -> None:
    pool = ThreadPoolExecutor(policy.parallel, thread_name_prefix="fetch")
    try:
        running = [pool.submit(download.run) for download in downloads]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        stop.set()  # one failed, or all are done
        failed = [job for job in running if job in done and job.exception() is not None]
        for job in failed or running:
            job.result()
    finally:
        stop.set()
        for download in downloads:
            download.hang_up()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _turn(folder: Path, policy: Policy) -> Iterator[None]:
    """Let those who fetch into one folder take turns: nodes may share it."""
    with contextlib.ExitStack() as turn:
        waiting = f"another process fetches into {folder}: waiting for it"
        try:
            turn.enter_context(held(folder / LOCK, wait_s=policy.deadline_s, waiting=waiting))
        except BlockingIOError:
            raise TransientError(
                f"another process has been fetching into {folder} for {policy.deadline_s:.0f} s"
            ) from None
        yield


class _Download:
    """One URL on its way to one file."""

    def __init__(  # noqa: PLR0913 (one thread's whole state)
        self,
        url: str,
        path: Path,
        *,
        token: SecretStr | None,
        source: DataSource,
        policy: Policy,
        stop: threading.Event,
    ) -> None:
        self.url, _, fragment = url.partition("#")
        self.sha256 = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.record = path.with_name(f".{path.name}.source")
        self.token, self.policy, self.stop = token, policy, stop
        self.allow_private = source.allow_private_addresses
        self.deadline = time.monotonic() + policy.deadline_s
        self.connection: Any = None

    @property
    def identity(self) -> str:
        """What the record of a finished file says: which address, without its secrets."""
        return hashlib.sha256(f"{self.url}#{self.sha256}".encode()).hexdigest()

    def run(self) -> None:
        """Download, verify and rename; or find that this was done before."""
        if self.is_there:
            log.info("%s is there already", self.path.name)
            return
        began = time.monotonic()
        with httpx.Client(
            timeout=httpx.Timeout(self.policy.stall_s, connect=10.0), follow_redirects=False
        ) as client:
            self._until_complete(client)
        verify(self.part, shown(self.url), sha256=self.sha256)
        size = self.part.stat().st_size
        self.part.replace(self.path)
        self._validator_file.unlink(missing_ok=True)
        write_whole(self.record, json.dumps({"identity": self.identity, "size": size}))
        log.info("fetched %s: %d bytes in %.1f s", self.path.name, size, time.monotonic() - began)

    @property
    def is_there(self) -> bool:
        """Whether an earlier run has fetched the whole file."""
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            return bool(known["identity"] == self.identity and known["size"] == self.path.stat().st_size)
        except (OSError, ValueError, KeyError):
            return False

    @property
    def _validator_file(self) -> Path:
        return self.path.with_name(f".{self.path.name}.validator")

    def _until_complete(self, client: httpx.Client) -> None:
        """Try until the whole body is there; a try that brought bytes does not count against the limit."""
        failures = 0
        while True:
            have = self._have()
            try:
                self._attempt(client, have)
            except (httpx.TransportError, httpx.StreamError, _Again) as error:
                failures = 1 if self._have() > have else failures + 1
                reason = str(error) or type(error).__name__
                pause = getattr(error, "retry_after_s", None)
                if pause is None:
                    pause = min(self.policy.backoff_s * 2 ** (failures - 1), 30.0)
                if failures >= self.policy.attempts or time.monotonic() + pause > self.deadline:
                    raise TransientError(
                        f"{shown(self.url)}: {reason}; gave up after {failures} tries"
                    ) from None
                log.warning("%s: %s; trying again in %.1f s", shown(self.url), reason, pause)
                if self.stop.wait(pause):
                    raise StoppedError("stopped while fetching data") from None
            else:
                return

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self, client: httpx.Client, have: int) -> None:
        """Make one request for what is missing and append it to the `.part` file."""
        validator = self._validator_file.read_text(encoding="utf-8") if self._validator_file.exists() else ""
        headers = {"Accept-Encoding": "identity"}
        if have and validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        with self._get(client, headers) as response:
            start = self._start(response, have if "Range" in headers else 0)
            length = response.headers.get("Content-Length", "")
            self._check_space(int(length) if length.isdigit() else 0)
            fresh = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if fresh.startswith("W/"):  # a weak tag does not promise the same bytes
                fresh = ""
            write_whole(self._validator_file, fresh)
            self._receive(response, start)

    @contextlib.contextmanager
    def _get(self, client: httpx.Client, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """GET the URL, following redirects one checked hop at a time, the token sent to the hub only."""
        url = self.url
        for _ in range(self.policy.redirects + 1):
            check_url(url, allow_private=self.allow_private)
            parts = urlsplit(url)
            secret = {}
            if self.token is not None and parts.scheme == "https" and parts.hostname in HUB_HOSTS:
                secret = {"Authorization": f"Bearer {self.token.get_secret_value()}"}
            watched = {"trace": self._watch}
            with client.stream("GET", url, headers={**headers, **secret}, extensions=watched) as response:
                self._check_peer(response, url)
                if not response.is_redirect:
                    yield response
                    return
                url = urljoin(url, response.headers["Location"])
        raise DataError(f"{shown(self.url)}: more than {self.policy.redirects} redirects")

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """Remember the connection that httpx opened, for `hang_up`."""
        if event == "connection.connect_tcp.complete":
            self.connection = info["return_value"]

    def hang_up(self) -> None:
        """End a download that waits for a silent server: called when all is over, from another thread."""
        opened = self.connection and self.connection.get_extra_info("socket")
        if opened:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def _check_peer(self, response: httpx.Response, url: str) -> None:
        """Check whom we are really connected to: a name may resolve differently the second time."""
        stream = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        if peer:
            check_address(str(peer[0]), url, allow_private=self.allow_private)

    def _start(self, response: httpx.Response, asked: int) -> int:
        """Return the byte that the body begins at; raises for anything but the file or the rest of it."""
        status = response.status_code
        if status == 200:
            return 0
        if status == 206 and asked:
            span = response.headers.get("Content-Range", "")
            if span.startswith(f"bytes {asked}-"):
                return asked
            self.part.unlink(missing_ok=True)
            raise _Again(f"answered the range from {asked} with {span!r}")
        if status == 416 and asked:
            self.part.unlink(missing_ok=True)
            raise _Again("has no bytes after what was fetched: starting over")
        if status in _RETRIED:
            raise _Again(f"answered {status}", net.seconds(response.headers.get("Retry-After")))
        hint = "; is HF_TOKEN set, or the signature expired?" if status in (401, 403) else ""
        raise DataError(f"{shown(self.url)}: answered {status}, expected the file{hint}")

    def _receive(self, response: httpx.Response, start: int) -> None:
        received, since = 0, time.monotonic()
        window_bytes = 0
        try:
            with self.part.open("ab" if start else "wb") as stream:
                for chunk in response.iter_raw():
                    stream.write(chunk)
                    received += len(chunk)
                    window_bytes += len(chunk)
                    now = time.monotonic()
                    if self.stop.is_set():
                        raise StoppedError("stopped while fetching data")
                    if now > self.deadline:
                        raise TransientError(
                            f"{shown(self.url)}: not complete after {self.policy.deadline_s:.0f} s"
                        )
                    if now - since >= self.policy.stall_s:
                        if window_bytes / (now - since) < self.policy.rate_bytes_s:
                            raise TransientError(
                                f"{shown(self.url)}: {window_bytes / (now - since):.0f} bytes/s, "
                                f"less than {self.policy.rate_bytes_s:.0f}"
                            )
                        since, window_bytes = now, 0
        except OSError as error:
            if error.errno == 28:  # ENOSPC
                raise CapacityError(f"{self.part}: no space left after {start + received} bytes") from None
            raise

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if needed > free:
            raise CapacityError(
                f"{self.part.parent}: {needed} bytes needed for {self.path.name}, {free} are free"
            )


class _Again(Exception):
    """The server answered in a way that a further try may mend."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


METADATA = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "fd00:ec2::254")))
"""Where clouds hand out a machine's own credentials (AWS and Azure and GCP, Alibaba, AWS over IPv6)."""


def check_url(url: str, *, allow_private: bool) -> None:
    """Raise DataError unless `url` is http(s) and its host resolves to allowed addresses only."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"{shown(url)}: only http and https addresses can be fetched")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except ValueError:
        raise DataError(f"{shown(url)}: not a valid address") from None
    except socket.gaierror:
        raise TransientError(f"{shown(url)}: host {parts.hostname} cannot be resolved") from None
    for *_, address in found:
        check_address(str(address[0]), url, allow_private=allow_private)


def check_address(address: str, url: str, *, allow_private: bool) -> None:
    """Raise DataError when `address`, which `url` led to, must not be spoken to."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    if ip.is_link_local or ip in METADATA or ip.is_multicast or ip.is_unspecified:
        raise DataError(f"{shown(url)}: leads to {ip}, a link-local or metadata address; it is never fetched")
    if not allow_private and (ip.is_private or ip.is_loopback):
        raise DataError(f"{shown(url)}: leads to the private address {ip}, and those are forbidden here")


def shown(url: str) -> str:
    """Return `url` without user, query and fragment, which may hold secrets."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "a malformed address"
    return f"{parts.scheme}://{host}{port}{parts.path}"


def verify(path: Path, what: str, *, sha256: str | None = None) -> None:
    """Raise DataError, and remove `path`, unless it is a whole data file; `what` names it in the message."""
    try:
        _check(path, what, sha256)
    except DataError:
        path.unlink(missing_ok=True)
        raise


def _check(path: Path, what: str, sha256: str | None) -> None:
    if not path.exists() or not path.stat().st_size:
        raise DataError(f"{what}: the file is empty")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        start = stream.read(64)
    if sha256 is not None and digest != sha256:
        raise DataError(f"{what}: sha256 is {digest}, expected {sha256}")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        raise DataError(
            f"{what}: not data but a web page (a login or an error page?); it starts with {start!r}"
        )
    name = path.name.removesuffix(".part").lower()
    if ".parquet" not in name and not start.startswith(b"PAR1"):
        return
    if not start.startswith(b"PAR1"):
        raise DataError(f"{what}: not a parquet file; it starts with {start[:40]!r}")
    try:
        with pa.parquet.ParquetFile(path) as file:
            rows = file.metadata.num_rows
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{what}: a damaged or incomplete parquet file of {path.stat().st_size} bytes"
        ) from None
    if not rows:
        raise DataError(f"{what}: a parquet file without rows")
