"""Atomic writes of files and folders, locks, and the cache folder.

What is new is written aside, under a scratch name whose lock its writer holds, and renamed when it is whole;
what killed writers left is removed by the next one at that place. It is synced to the disk before it is
renamed, unless whoever reads it verifies its digest. Does not know what is in it.
Start at `atomic_file` and `locked`.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from runtime.errors import CapacityError, ConfigError, Failure, TransientError

log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a lock that another holds is tried again."""

_SUFFIX = ".part"
_SCRATCH = re.compile(r"\.[0-9a-f]{8}\.part$")
_MOST_NAME = 60
"""Characters of a name that its scratch name repeats: at most 240 of the 255 bytes that a name may have."""
_ABANDONED_S = 24 * 3600
_RUST_ERROR = re.compile(r"\(os error ([0-9]{1,4})\)")

_WHOLE_BYTES = 4 * 2**20
_SAMPLES, _SAMPLE_BYTES = 32, 2**16
"""A larger file is sampled in this many evenly spaced pieces, its start and end among them: weights of a
hundred gigabytes would take minutes to read."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_SUCH_PLACE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
)
_BROKEN = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO})
"""Of a disk, or of a server of files."""
_TOO_MANY_OPEN = frozenset({errno.EMFILE, errno.ENFILE})
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
    with _aside(path, 0o666 if mode is None else mode, folder=False) as (scratch, descriptor):
        with open(descriptor, "wb", closefd=False) as stream:
            if mode is not None:
                os.fchmod(descriptor, mode)
            yield stream
            stream.flush()
            os.fsync(descriptor)
        scratch.replace(path)


def write_atomic(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write `text` so that `path` has all of it or does not change."""
    with atomic_file(path, mode=mode) as stream:
        stream.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path, *, synced: bool = True, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends well and is removed otherwise.

    Its files may be read by all whom the umask lets: safetensors makes files that only their owner can read.
    An existing folder at `path` is replaced.
    """
    with _aside(path, mode, folder=True) as (scratch, _):
        yield scratch
        _finish(scratch, synced=synced)
        _replace_folder(scratch, path)
        if synced:
            sync_directory(path.parent)


@contextlib.contextmanager
def atomic_files(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a scratch folder whose files move into `folder` when the block ends well, `last` last.

    Each is moved atomically, with the permissions of the user's umask; the other files of `folder` stay.
    """
    with _aside(folder / last, 0o777, folder=True) as (scratch, _):
        yield scratch
        found = _finish(scratch, synced=True)
        for path in sorted(found, key=lambda path: (path.name == last, str(path))):
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        sync_directory(folder)


@contextlib.contextmanager
def _aside(path: Path, mode: int, *, folder: bool) -> Iterator[tuple[Path, int]]:
    """Yield a new file or folder beside `path` and its descriptor; it is removed if it is still there.

    What processes that were killed have left beside `path` goes first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    make = _make_folder if folder else _make_file
    while True:
        scratch = _scratch_name(path)
        descriptor = make(scratch, mode)
        if _acquire(descriptor) is not False and _is_still(descriptor, scratch):
            break
        os.close(descriptor)  # another process took it for one that a dead process left
    try:
        yield scratch, descriptor
    finally:
        os.close(descriptor)
        remove(scratch)


def _make_file(path: Path, mode: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)


def _make_folder(path: Path, mode: int) -> int:
    path.mkdir(mode=mode)
    return os.open(path, os.O_RDONLY)


def _scratch_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:_MOST_NAME]}.{secrets.token_hex(4)}{_SUFFIX}")


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in `folder` of files and folders (called `name`) that they wrote.

    Whoever writes at one holds its lock; where there are no locks, it is abandoned after a day.
    """
    prefix = "." if name is None else f".{name[:_MOST_NAME]}."
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name.startswith(prefix) and _SCRATCH.search(path.name):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    """Remove `path` unless it is written at, under its lock: who has just made it may begin meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        held = _acquire(descriptor)
        age_s = time.time() - os.fstat(descriptor).st_mtime
        if age_s > _ABANDONED_S if held is None else held:
            remove(path)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder as far as that is possible; nothing fails."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; ConfigError when an existing `folder` cannot be moved (a mount)."""
    old = _scratch_name(folder)
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


def _finish(folder: Path, *, synced: bool) -> list[Path]:
    """Let the files below a new `folder` be read by all whom the umask lets, and sync them to the disk."""
    mode = folder.stat().st_mode & 0o666
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in found:
        before = path.stat().st_mode
        if before | mode != before:
            path.chmod(before | mode)
        if synced:
            with path.open("rb") as written:
                os.fsync(written.fileno())
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


def sampled_sha256(path: Path) -> str:
    """Return a digest by which a file is known: of a large one, of its size and samples of its bytes."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1), os.SEEK_SET)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what the file system refuses under `path` into an error a user can act on."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        met = error if isinstance(error, OSError) else _told_by_rust(error)
        failure = disk_failure(met, path, needed_bytes=needed_bytes) if met is not None else None
        if failure is None:
            raise
        raise failure from None


def _told_by_rust(error: Exception) -> OSError | None:
    """Return the error of the system that a library in Rust (safetensors) puts into a text of its own."""
    found = _RUST_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def disk_failure(
    error: OSError, path: Path | None = None, *, needed_bytes: int | None = None
) -> Failure | None:
    """Return what a user can do about `error`, met under `path`; None where it is not about a path.

    CapacityError for a full disk or a file beyond a limit, TransientError for a broken one, ConfigError for a
    path that does not exist, may not be used or is none, and for too many open files.
    """
    reason = error.strerror
    named = error.filename2 or error.filename or path
    if error.errno in _FULL:
        need = f"; {needed_bytes} bytes are needed" if needed_bytes else ""
        return CapacityError(f"{path or named}: the disk is full{need}; free space or use another directory")
    if error.errno == errno.EFBIG:
        return CapacityError(
            f"{path or named}: the file is larger than this process may write, or its file system; "
            "raise `ulimit -f`, or use another directory"
        )
    if error.errno in _TOO_MANY_OPEN:
        return ConfigError(f"too many open files ({reason}); raise `ulimit -n`")
    if named is None:
        return None
    if error.errno in _BROKEN:
        return TransientError(f"{path or named}: the file system failed ({reason}); check it and try again")
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


def check_temporary() -> None:
    """Raise ConfigError where no temporary directory is usable, as in a container with a read-only root.

    torchrun, datasets and archives need one, and fail late and with other words.
    """
    with _temporary_errors():
        tempfile.gettempdir()


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a folder that is gone after the block; ConfigError when none can be made."""
    with _temporary_errors():
        made = tempfile.TemporaryDirectory(prefix=prefix)
    with made as name:
        yield Path(name)


@contextlib.contextmanager
def _temporary_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"no temporary directory can be made ({error.strerror}); mount one at /tmp or set TMPDIR"
        ) from None


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float = math.inf, waiting: str = "") -> Iterator[int]:
    """Hold the lock of the file or folder `path` while the block runs, and yield its descriptor.

    `waiting` is logged when another process holds it. A file that does not exist is created.

    A child process that inherits the descriptor holds the lock too: it is free when all of them have ended,
    however they ended. Raises BlockingIOError when another process still holds it after `wait_s`. On a file
    system without locks nothing is held.
    """
    until = time.monotonic() + wait_s
    descriptor = _open_lock(path)
    try:
        while _acquire(descriptor) is False or not _is_still(descriptor, path):
            if time.monotonic() >= until:
                raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
            if waiting:
                log.info(waiting)
                waiting = ""
            time.sleep(POLL_S)
            if not _is_still(descriptor, path):  # its holder has removed it
                os.close(descriptor)
                descriptor = _open_lock(path)
        yield descriptor
    finally:
        os.close(descriptor)  # not unlocked: a child may go on holding it


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether `path` names the file or folder that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _acquire(descriptor: int) -> bool | None:
    """Whether the lock was acquired; None where the file system has none."""
    from filelock import lock_descriptor  # as long as all imports of `runtime --help` otherwise take

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return None


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
