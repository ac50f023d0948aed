"""Downloads data files: in parallel, verified, under their final names only when complete.

Knows what a data file looks like; which addresses are allowed is in hops.py, how a download resumes in
runtime/net.py. Does not know what rows are. Start at `fetch`.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from pydantic import SecretStr

from runtime import files, net, oci
from runtime.errors import DataError, TransientError
from runtime.files import locked, write_atomic
from runtime.net import DEFAULT_LIMITS, DownloadLimits
from runtime.oci.access import DEFAULT
from runtime.tuning.data import urls
from runtime.tuning.data.folder import local_paths
from runtime.tuning.data.formats import COMPRESSED
from runtime.tuning.data.formats.columnar import cut_short
from runtime.tuning.data.hops import Hops
from runtime.tuning.data.limits import ByteCount, DataLimits
from runtime.tuning.data.urls import DataUrl, shown
from runtime.tuning.settings import DataSource

log = logging.getLogger(__name__)

LOCK = ".fetching"
"""Locked in the data folder by the process that fetches into it."""

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
    sent = ByteCount(DataLimits.of(source.max_bytes, source.folder).wire, "sends")
    if source.image is not None:
        image = source.image
        folder = source.folder / "image"
        oci.pull(
            oci.parse(image),
            folder,
            access=access,
            watch=oci.Watch(image=lambda size: sent.expect(size, image)),
        )
        return
    if not source.urls:
        return
    stop = threading.Event()
    source.folder.mkdir(parents=True, exist_ok=True)
    downloads = []
    for text, path in zip(dict.fromkeys(source.urls), local_paths(source.urls, source.folder), strict=True):
        url = urls.parse(text)
        hops = Hops(url.url, token, allow_private=source.allow_private_addresses, limits=limits)
        download = net.Download(path, shown(url.url), limits=limits, stop=stop, counted=sent)
        downloads.append(_DataFile(url, path, hops, download))
        if downloads[-1].is_there:
            sent.add(path.stat().st_size, shown(url.url))
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
            download.hops.hang_up()
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

    def __init__(self, url: DataUrl, path: Path, hops: Hops, download: net.Download) -> None:
        self.url, self.path, self.hops = url, path, hops
        self._record = path.with_name(f".{path.name}.source")
        self._download = download

    def run(self) -> None:
        """Download, verify and rename; or find that this was done before."""
        if self.is_there:
            log.info("%s is there already", self.path.name)
            return
        began, what, digest = time.monotonic(), shown(self.url.url), self.url.sha256
        with contextlib.closing(self.hops):
            self._download.run(self.hops.get)
        if self._download.codings:
            if digest is not None and files.sha256(self._download.part) == digest:
                digest = None  # of the file as it lies on the server, which may be what the user hashed
            self._download.decode()
        verify(self._download.part, what, sha256=digest)
        self._download.finish()
        size = self.path.stat().st_size
        write_atomic(self._record, json.dumps({"identity": self.url.identity, "size": size}))
        log.info("fetched %s: %d bytes in %.1f s", self.path.name, size, time.monotonic() - began)

    @property
    def is_there(self) -> bool:
        """Whether an earlier run has downloaded the file completely."""
        try:
            known = json.loads(self._record.read_text(encoding="utf-8"))
            size = self.path.stat().st_size
            return bool(known["identity"] == self.url.identity and known["size"] == size)
        except (OSError, ValueError, KeyError):
            return False


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
    if not start.startswith(b"PAR1") and (".parquet" not in name or name.endswith(COMPRESSED)):
        return
    if not start.startswith(b"PAR1"):
        raise DataError(f"{what}: not a parquet file; it starts with {start[:40]!r}")
    with path.open("rb") as stream:
        if cut := cut_short(stream):
            raise DataError(f"{what}: {cut}")
    try:
        pa.parquet.ParquetFile(path).close()
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{what}: a damaged Parquet file of {path.stat().st_size:,} bytes; write it again"
        ) from None
