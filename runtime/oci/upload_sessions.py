"""Keeps the addresses of open upload sessions, so that a killed push does not restart its blob.

One small file per upload in a folder of the user; the process that resumes an upload removes its file, so
two processes never write to one upload. Without a folder nothing is kept. Start at `UploadSessions`.
"""

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path

from runtime.files import write_atomic

log = logging.getLogger(__name__)

_MAX_AGE_S = 7 * 24 * 3600.0
"""Registries drop uploads after about a week; older files are ignored."""


class UploadSessions:
    """The open upload sessions of this user."""

    def __init__(self, folder: Path | None):
        self._folder = folder

    def take(self, uploads_url: str, digest: str) -> str | None:
        """Return the session in which the upload of a blob resumes, and forget it; None without one."""
        path = self._path(uploads_url, digest)
        if path is None:
            return None
        claimed = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.rename(claimed)
            fresh = time.time() - claimed.stat().st_mtime < _MAX_AGE_S
            return claimed.read_text(encoding="utf-8") if fresh else None
        except (OSError, UnicodeDecodeError):
            return None
        finally:
            with contextlib.suppress(OSError):
                claimed.unlink()

    def keep(self, uploads_url: str, digest: str, session: str) -> None:
        """Remember the session of a blob's upload; a folder that cannot be written is only logged."""
        path = self._path(uploads_url, digest)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(path, session, mode=0o600)
        except OSError as error:
            log.debug("%s: uploads are not remembered (%s)", path.parent, error.strerror)

    def forget(self, uploads_url: str, digest: str) -> None:
        """The upload is complete, or lost."""
        path = self._path(uploads_url, digest)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, uploads_url: str, digest: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / hashlib.sha256(f"{uploads_url} {digest}".encode()).hexdigest()
