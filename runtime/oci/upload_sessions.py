"""Remembers where an upload goes on, so that a killed push does not begin its blob again.

One small file per upload in a folder of the user's; taken (removed) by whoever continues it, so two
processes never write to one upload. Without a folder nothing is remembered. Start at `UploadSessions`.
"""

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path

from runtime.files import write_atomic

log = logging.getLogger(__name__)

_OLDEST_S = 7 * 24 * 3600.0
"""Registries forget uploads after about a week; older files are passed over."""


class UploadSessions:
    """The open uploads that this user has."""

    def __init__(self, folder: Path | None):
        self._folder = folder

    def take(self, uploads_url: str, digest: str) -> str | None:
        """Return where the upload of a blob goes on, and forget it; None when none is known."""
        path = self._path(uploads_url, digest)
        if path is None:
            return None
        mine = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.rename(mine)
            return (
                mine.read_text(encoding="utf-8") if time.time() - mine.stat().st_mtime < _OLDEST_S else None
            )
        except (OSError, UnicodeDecodeError):
            return None
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()

    def keep(self, uploads_url: str, digest: str, session: str) -> None:
        """Remember where the upload of a blob goes on; a folder that cannot be written costs only that."""
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
