"""Files that are whole or absent, on the disk when that is said, and in one job's hands.

Plain files: does not know what is in them. Start at `write_whole`.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_S = 0.1
"""How often a lock that another holds is tried again."""


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that `path` has all of it or does not change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def finish(path: Path, *, mode: int) -> None:
    """Bring a file that a library has written to the disk, readable to whom `mode` says.

    safetensors makes files that only their owner can read, whatever the user's umask.
    """
    with path.open("rb") as written:
        os.fsync(written.fileno())
    path.chmod(mode)


def sync_directory(folder: Path) -> None:
    """Bring a directory's own entries (names made or moved in it) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def held(path: Path, *, wait_s: float, waiting: str = "") -> Iterator[int]:
    """Hold the lock file `path` while the block runs, and yield its descriptor.

    `waiting` is logged when another holds it.

    A child process that is given the descriptor holds it too: the lock is free when all of them have ended,
    however they ended. Raises BlockingIOError when another still holds it after `wait_s`. On a file system
    without locks nothing is held.
    """
    until = time.monotonic() + wait_s
    with path.open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
                if waiting:
                    log.info(waiting)
                    waiting = ""
                time.sleep(LOOK_S)
            except OSError as error:
                if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}:
                    raise
                break
            else:
                break
        yield lock.fileno()
