"""The digest of the weights that were read: by it a report, a server and a statement name the same model.

Of one file its SHA-256, of several that of the list of theirs, as `LC_ALL=C sha256sum *.safetensors |
sha256sum` prints it. Every byte is read once more, by a thread of the lowest priority. Does not know models.
Start at `of_folder` and `PendingDigest`.
"""

import hashlib
import logging
import os
import re
import threading
from pathlib import Path

from runtime.errors import ConfigError
from runtime.files import sha256

log = logging.getLogger(__name__)

VARIABLE = "RUNTIME_WEIGHTS_DIGEST"
"""Environment variable: `auto` takes names in the hub's cache for digests, `full` reads all, `off` none."""
MODES = ("auto", "full", "off")
_FILES = "*.safetensors"
_HEX_64 = re.compile(r"[0-9a-f]{64}")
_LOWEST = 19


def mode(given: str | None) -> str:
    """Return what VARIABLE asks for; ConfigError for anything else."""
    chosen = given or MODES[0]
    if chosen not in MODES:
        raise ConfigError(f"{VARIABLE} is {chosen!r}, expected one of {', '.join(MODES)}")
    return chosen


def of_folder(folder: Path, *, trusted_names: bool = False) -> str | None:
    """Return the digest of the weight files in `folder`, 64 hex digits; None without any.

    trusted_names: in the Hugging Face cache, where files of any size are kept by their digest, take the name
    for it instead of reading the file.
    """
    found = sorted(folder.glob(_FILES), key=lambda path: os.fsencode(path.name))
    digests = [(trusted_names and _name_in_cache(path)) or sha256(path) for path in found]
    if len(found) < 2:
        return digests[0] if digests else None
    lines = (f"{digest}  {path.name}\n" for digest, path in zip(digests, found, strict=True))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class PendingDigest:
    """The digest of a folder's weights, which becomes known while other work goes on."""

    def __init__(self, folder: Path, *, name: str, mode: str = MODES[0]):
        """Prepare to compute it, unless `mode` is off; the log will say it of what is called `name`."""
        self.value: str | None = None
        """None until it is known."""
        self.folder = folder
        self._name, self._mode = name, mode
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, the first time that this is called."""
        if self._thread is None and self._mode != "off":
            self._thread = threading.Thread(target=self._compute, name="digest", daemon=True)
            self._thread.start()

    def wait(self) -> str | None:
        """Return the digest once it is known; None where it is not computed, or cannot be."""
        self.start()
        if self._thread is not None:
            self._thread.join()
        return self.value

    def _compute(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)  # of this thread alone
        except (OSError, AttributeError):  # not Linux
            log.debug("the digest of the weights is computed at the usual priority")
        try:
            self.value = of_folder(self.folder, trusted_names=self._mode == "auto")
        except OSError as error:
            log.warning("weights of %s: no digest, they cannot be read (%s)", self._name, error.strerror)
            return
        if self.value is not None:
            log.info("weights of %s: sha256 %s", self._name, self.value)


def _name_in_cache(path: Path) -> str | None:
    """Return the name of a file of a snapshot in the hub's cache among its blobs, where that is a SHA-256."""
    if path.parent.parent.name != "snapshots" or not path.is_symlink():
        return None
    blob = path.resolve()
    is_blob = blob.parent == path.parent.parent.parent.resolve() / "blobs"
    return blob.name if is_blob and _HEX_64.fullmatch(blob.name) else None
