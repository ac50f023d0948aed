"""Files that are whole or absent, and on the disk when that is said.

Plain files: does not know what is in them. Start at `write_whole`.
"""

import hashlib
import os
from pathlib import Path


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
