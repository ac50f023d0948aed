"""Downloads data files: in parallel, verified, under their final names only when complete.

Knows which addresses are allowed and what a data file looks like; how a download resumes is in
runtime/net.py. Does not know what rows are. Start at `fetch`.
"""

import contextlib
import hashlib
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pyarrow as pa
import pyarrow.parquet
from pydantic import SecretStr

from runtime import addresses, files, net, oci
from runtime.errors import DataError, TransientError
from runtime.files import locked, write_atomic
from runtime.net import DEFAULT_LIMITS, DownloadLimits
from runtime.oci.access import DEFAULT
from runtime.tuning.data.folder import local_paths
from runtime.tuning.settings import DataSource

log = logging.getLogger(__name__)

HUB_HOSTS = frozenset({"huggingface.co", "hf.co"})
"""Hosts that the Hugging Face token is sent to; a redirect elsewhere goes without it."""

LOCK = ".fetching"
"""Locked in the data folder by the process that fetches into it."""

_REDIRECTS = 5
_PARALLEL = 4


def fetch(
    source: DataSource,
    *,
    token: SecretStr | None = None,
    limits: DownloadLimits = DEFAULT_LIMITS,
    access: oci.Access = DEFAULT,
) -> None:
    """Download every file of `source` into its folder; complete files are kept.

    Raises DataError for failures that a retry does not mend (404, HTML, a wrong digest), TransientError for
    the others.
    """
    if source.image is not None:
        oci.pull(oci.parse(source.image), source.folder / "image", access=access)
        return
    if not source.urls:
        return
    stop = threading.Event()
    allow_private = source.allow_private_addresses
    downloads = [
        _DataFile(_Address(url, token, allow_private), path, limits, stop)
        for url, path in zip(dict.fromkeys(source.urls), local_paths(source.urls, source.folder), strict=True)
    ]
    source.folder.mkdir(parents=True, exist_ok=True)
    complete = all(download.is_there for download in downloads)
    with contextlib.nullcontext() if complete else _locked(source.folder, limits.deadline_s):
        _run(downloads, stop)


def _run(downloads: "list[_DataFile]", stop: threading.Event) -> None:
    pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="fetch")
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
            download.address.hang_up()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _locked(folder: Path, wait_s: float) -> Iterator[None]:
    """Keep other processes from fetching into `folder` meanwhile: nodes may share it."""
    with contextlib.ExitStack() as stack:
        waiting = f"another process fetches into {folder}: waiting for it"
        try:
            stack.enter_context(locked(folder / LOCK, wait_s=wait_s, waiting=waiting))
        except BlockingIOError:
            raise TransientError(
                f"another process has been fetching into {folder} for {wait_s:.0f} s"
            ) from None
        yield


class _DataFile:
    """One address, and the file that its data goes to."""

    def __init__(
        self, address: "_Address", path: Path, limits: DownloadLimits, stop: threading.Event
    ) -> None:
        self.address, self.path = address, path
        self._record = path.with_name(f".{path.name}.source")
        self._timeout = httpx.Timeout(limits.stall_s, connect=10.0)
        self._download = net.Download(path, shown(address.url), limits=limits, stop=stop)

    def run(self) -> None:
        """Download, verify and rename; or find that this was done before."""
        if self.is_there:
            log.info("%s is there already", self.path.name)
            return
        began = time.monotonic()
        with httpx.Client(timeout=self._timeout, follow_redirects=False) as client:
            self._download.run(lambda headers: self.address.get(client, headers))
        verify(self._download.part, shown(self.address.url), sha256=self.address.sha256)
        self._download.finish()
        size = self.path.stat().st_size
        write_atomic(self._record, json.dumps({"identity": self.address.identity, "size": size}))
        log.info("fetched %s: %d bytes in %.1f s", self.path.name, size, time.monotonic() - began)

    @property
    def is_there(self) -> bool:
        """Whether an earlier run has downloaded the file completely."""
        try:
            known = json.loads(self._record.read_text(encoding="utf-8"))
            size = self.path.stat().st_size
            return bool(known["identity"] == self.address.identity and known["size"] == size)
        except (OSError, ValueError, KeyError):
            return False


class _Address:
    """The address of a file, `URL` or `URL#sha256=DIGEST`, and the requests for it."""

    def __init__(self, url: str, token: SecretStr | None, allow_private: bool) -> None:
        self.url, _, fragment = url.partition("#")
        self.sha256 = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
        self._token, self._allow_private = token, allow_private
        self._connection: Any = None
        self._hung_up = False

    @property
    def identity(self) -> str:
        """Digest of the address, which may hold secrets: a finished file is recorded with it."""
        return hashlib.sha256(f"{self.url}#{self.sha256}".encode()).hexdigest()

    @contextlib.contextmanager
    def get(self, client: httpx.Client, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """GET the URL, following redirects one checked hop at a time, the token sent to the hub only."""
        url = self.url
        for _ in range(_REDIRECTS + 1):
            check_url(url, allow_private=self._allow_private)
            parts = urlsplit(url)
            secret = {}
            if self._token is not None and parts.scheme == "https" and parts.hostname in HUB_HOSTS:
                secret = {"Authorization": f"Bearer {self._token.get_secret_value()}"}
            traced = {"trace": self._trace}
            with client.stream("GET", url, headers={**headers, **secret}, extensions=traced) as response:
                self._check_peer(response, url)
                if response.status_code in (401, 403):
                    raise DataError(
                        f"{shown(self.url)}: answered {response.status_code}, expected the file; "
                        "is HF_TOKEN set, or the signature expired?"
                    )
                if not response.is_redirect:
                    yield response
                    return
                url = urljoin(url, response.headers["Location"])
        raise DataError(f"{shown(self.url)}: more than {_REDIRECTS} redirects")

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember the connection that httpx opened, for `hang_up`, which may have been called before."""
        if event == "connection.connect_tcp.complete":
            self._connection = info["return_value"]
            if self._hung_up:
                self._shut_down()

    def hang_up(self) -> None:
        """End a request that waits for a silent server; called from another thread at the end."""
        self._hung_up = True
        self._shut_down()

    def _shut_down(self) -> None:
        opened = self._connection and self._connection.get_extra_info("socket")
        if opened:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def _check_peer(self, response: httpx.Response, url: str) -> None:
        """Check the address of the connection: a name may resolve differently the second time."""
        stream = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        if peer:
            check_address(str(peer[0]), url, allow_private=self._allow_private)


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
    """Raise DataError when `address`, which `url` led to, must not be connected to."""
    *_, ip = addresses.meanings(ipaddress.ip_address(address.partition("%")[0]))
    if addresses.forbidden(address):
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
    """Raise DataError, and remove `path`, unless it is a complete data file; messages call it `what`."""
    try:
        _check(path, what, sha256)
    except DataError:
        path.unlink(missing_ok=True)
        raise


def _check(path: Path, what: str, sha256: str | None) -> None:
    if not path.exists() or not path.stat().st_size:
        raise DataError(f"{what}: the file is empty")
    if sha256 is not None and (digest := files.sha256(path)) != sha256:
        raise DataError(f"{what}: sha256 is {digest}, expected {sha256}")
    with path.open("rb") as stream:
        start = stream.read(64)
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
