"""Atomic writes of files and folders, locks, and the cache folder.

New files are written under a temporary name in the same directory and renamed. Does not know what is in them.
Start at `atomic_file` and `locked`.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from runtime.errors import CapacityError, ConfigError, Failure

log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a lock that another holds is tried again."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_SUCH_PLACE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
)
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return where a process with this environment keeps what it can fetch again.

    $RUNTIME_CACHE, else `workspace-runtime` in $XDG_CACHE_HOME or ~/.cache; without a home, in /tmp/.cache.
    """
    if environ.get("RUNTIME_CACHE"):
        return Path(environ["RUNTIME_CACHE"])
    home = environ.get("HOME") or "/tmp"  # noqa: S108
    return Path(environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "workspace-runtime"


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """Yield a new file, synced and renamed to `path` when the block ends well and removed otherwise.

    `mode` is its permissions whatever the user's umask, from its first byte on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # process ids repeat in containers
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if mode is not None:
                os.fchmod(descriptor, mode)
            yield stream
            stream.flush()
            os.fsync(descriptor)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write `text` so that `path` has all of it or does not change."""
    with atomic_file(path, mode=mode) as stream:
        stream.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path, *, written_here: bool = True) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends well and is removed otherwise.

    With `written_here` its files are synced to disk and get the permissions of the user's umask: safetensors
    makes files that only their owner can read. An existing folder at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        if written_here:
            _sync_files(scratch)
        replace_folder(scratch, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a scratch folder whose files move into `folder` when the block ends well, `last` last.

    Each is moved atomically, with the permissions of the user's umask; the other files of `folder` stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{last}.{os.getpid()}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        found = _sync_files(scratch)
        for path in sorted(found, key=lambda path: (path.name == last, str(path))):
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        sync_directory(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; ConfigError when an existing `folder` cannot be moved (a mount)."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        try:
            folder.rmdir()  # an empty folder, as Kubernetes mounts them
        except OSError:
            try:
                folder.rename(old)
            except OSError as error:
                raise ConfigError(
                    f"{folder}: cannot be replaced ({error.strerror}); name a folder below it"
                ) from None
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sync_files(folder: Path) -> list[Path]:
    """Sync the files below a new `folder` to disk and give them the permissions of the user's umask."""
    mode = folder.stat().st_mode & 0o666
    found = [path for path in folder.rglob("*") if path.is_file()]
    for path in found:
        with path.open("rb") as written:
            os.fsync(written.fileno())
        path.chmod(mode)
    return found


def sync_directory(folder: Path) -> None:
    """Sync a directory's own entries (names made or moved in it) to disk."""
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
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what the file system refuses under `path` into an error a user can act on."""
    try:
        yield
    except OSError as error:
        failure = disk_failure(error, path, needed_bytes=needed_bytes)
        if failure is None:
            raise
        raise failure from None


def disk_failure(
    error: OSError, path: Path | None = None, *, needed_bytes: int | None = None
) -> Failure | None:
    """Return what a user can do about `error`, met under `path`; None where it is not about a path.

    CapacityError for a full disk, ConfigError for a path that does not exist, may not be used or is none.
    """
    reason = error.strerror
    named = error.filename2 or error.filename or path
    if error.errno in _FULL:
        need = f"; {needed_bytes} bytes are needed" if needed_bytes else ""
        return CapacityError(f"{path or named}: the disk is full{need}; free space or use another directory")
    if named is None:
        return None
    if error.errno in _REFUSED:
        return ConfigError(f"{named}: not allowed ({reason})")
    if error.errno in _NO_SUCH_PLACE:
        where = f"{path}: cannot be used ({named}: {reason})" if path else f"{named}: {reason}"
        return ConfigError(f"{where}; name another path")
    return None


def check_folder(path: Path, what: str) -> None:
    """Raise ConfigError unless `path` is a folder or can become one, by the kinds of what is there.

    `what` says what it is for.
    """
    for existing in (path.absolute(), *path.absolute().parents):
        if os.path.lexists(existing):
            if existing.is_dir():
                return
            kind = "a link that leads to no directory" if existing.is_symlink() else "a file"
            where = f"{path}: is" if existing == path.absolute() else f"{path}: {existing} is"
            raise ConfigError(f"{where} {kind}, expected {what}")


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float = math.inf, waiting: str = "") -> Iterator[int]:
    """Hold the lock of the file or folder `path` while the block runs, and yield its descriptor.

    `waiting` is logged when another process holds it. A file that does not exist is created.

    A child process that inherits the descriptor holds the lock too: it is free when all of them have ended,
    however they ended. Raises BlockingIOError when another process still holds it after `wait_s`. On a file
    system without locks nothing is held.
    """
    until = time.monotonic() + wait_s
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_APPEND | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        while not _acquire(descriptor):
            if time.monotonic() >= until:
                raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
            if waiting:
                log.info(waiting)
                waiting = ""
            time.sleep(POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)  # not unlocked: a child may go on holding it


def _acquire(descriptor: int) -> bool:
    """Whether the lock was acquired, or the file system has none."""
    from filelock import lock_descriptor  # as long as all imports of `runtime --help` otherwise take

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return True


def kind_of(text: str) -> Literal["file", "folder"] | None:
    """Return what lies at the path `text`, which may begin with `~`; None for nothing.

    Text from outside may be a model or an image as well, and no path: too long, or of no user's home.
    """
    try:
        path = Path(text).expanduser()
        return "folder" if path.is_dir() else "file" if path.is_file() else None
    except RuntimeError:  # of expanduser
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
