"""The files of adapters on disk, by the digest of their image; those that nobody asked for the longest leave.

A folder of this server alone. Called from several threads. Does not know registries. Start at `AdapterFiles`.
"""

import contextlib
import logging
import os
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.errors import ConfigError
from runtime.files import check_folder, disk_errors, locked, temporary_folder

log = logging.getLogger(__name__)

IMAGE = "image"
"""The folder within an entry that holds what was pulled; beside it lies what a pull under way needs."""


class AdapterFiles:
    """Folders of pulled adapters, `most_bytes` of them together."""

    def __init__(self, root: Path | None, *, most_bytes: int, on_evicted: Callable[[], object]) -> None:
        """`root` None is a temporary folder. ConfigError for one that another server uses, or none may."""
        self._stack = contextlib.ExitStack()
        self._most_bytes, self._on_evicted = most_bytes, on_evicted
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes by digest, the least recently used first."""
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()
        if root is None:
            root = self._stack.enter_context(temporary_folder("adapters-"))
        else:
            self._take(root)
        self._root = root
        for entry in sorted((each for each in root.iterdir() if each.is_dir()), key=_modified):
            if (entry / IMAGE).is_dir():
                self._sizes[_digest(entry)] = _size(entry)
            else:  # of a pull that was killed
                shutil.rmtree(entry, ignore_errors=True)
        self._evict()

    def _take(self, root: Path) -> None:
        check_folder(root, "a folder for adapters")
        with disk_errors(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._stack.enter_context(locked(root, wait_s=0))
            except BlockingIOError:
                raise ConfigError(
                    f"adapter_cache {root}: another server uses it; give each a directory of its own"
                ) from None

    def close(self) -> None:
        """Give the folder back; a temporary one goes."""
        self._stack.close()

    @contextlib.contextmanager
    def holding(self, digest: str) -> Iterator[Path]:
        """Yield the folder for what the image holds, there or not; it stays while the block runs."""
        with self._lock:
            self._held[digest] += 1
        entry = self._entry(digest)
        try:
            yield entry / IMAGE
        finally:
            with self._lock:
                self._held[digest] -= 1
                if not self._held[digest]:
                    del self._held[digest]
                if (entry / IMAGE).is_dir():
                    self._sizes[digest] = self._sizes.get(digest) or _size(entry)
                    self._sizes.move_to_end(digest)
                    os.utime(entry)
                elif not self._held[digest]:  # what is left of a pull that failed
                    shutil.rmtree(entry, ignore_errors=True)
            self._evict()

    def make_room(self, size: int) -> None:
        """Remove what is not held, so that `size` further bytes are within the limit."""
        self._evict(size)

    def _evict(self, further: int = 0) -> None:
        with self._lock:
            for digest in list(self._sizes):
                if sum(self._sizes.values()) + further <= self._most_bytes:
                    return
                if not self._held[digest]:
                    shutil.rmtree(self._entry(digest), ignore_errors=True)
                    del self._sizes[digest]
                    self._on_evicted()
                    log.info("Adapter files removed from disk: %s", digest)

    def _entry(self, digest: str) -> Path:
        return self._root / digest.replace(":", "-")


def _digest(entry: Path) -> str:
    return entry.name.replace("-", ":", 1)


def _modified(entry: Path) -> float:
    return entry.stat().st_mtime


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
