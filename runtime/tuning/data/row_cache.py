"""Encoded rows kept for later jobs, by what they were made of.

A key stands for the bytes of the data, the tokenizer with its template, the settings that matter, and the
code that encodes. Each entry is a folder as encoded.py writes it, below one that only its owner may use;
those used longest ago go first. Does not know rows. Start at `key_of`, then `RowCache`.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import runtime
from runtime.errors import CapacityError, DataError
from runtime.files import atomic_folder, disk_failure, remove_abandoned, sha256
from runtime.logs import counted
from runtime.quantities import show_bytes
from runtime.tuning.data import dataset, encoded
from runtime.tuning.data.encoded import FACTS, ROWS, EncodedData, EncodingFacts
from runtime.tuning.data.tokenize import is_models_own
from runtime.tuning.settings import TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MOST_BYTES = 8 << 30
"""Of all entries together."""
FREE_SHARE = 0.1
"""Part of the file system's free space that all entries may take, where that is less."""

_WITHOUT_EFFECT = frozenset({"urls", "image", "folder", "file", "allow_private_addresses", "cache"})
"""Settings of a data source that the files which were found stand for, or that change no row."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow")
_PATHS = frozenset({"name_or_path", "tokenizer_file", "vocab_file", "merges_file"})


def key_of(
    job: TuningJob,
    tokenizer: "PreTrainedTokenizerBase",
    files: "list[Path]",
    *,
    max_tokens: int,
    end_ids: frozenset[int],
) -> str:
    """Return what stands for the encoded rows of a job whose data lies here, 64 hex digits.

    `files` and what follows are as in `dataset.load` and `Encoder`.
    """
    parts = {
        "files": dataset.names_and_digests(job.data, files),
        "data": job.data.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT)),
        "encoding": job.encoding.model_dump(mode="json", exclude={"batching", "max_tokens"}),
        "max_tokens": max_tokens,
        "end_ids": sorted(end_ids),
        "model": job.model.name,  # as messages of the log name it
        "tokenizer": _tokenizer_digest(tokenizer),
        "code": _code_digest(),
        "versions": [platform.python_version(), *map(metadata.version, _LIBRARIES)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of a fast tokenizer and its template, wherever its files lie."""
    options = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _PATHS}
    parts = [
        type(tokenizer).__name__,
        _own_code(type(tokenizer)),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        options,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _own_code(kind: type) -> dict[str, str]:
    """Return the digests of the files beside a class that the model brings; {} for one of a library."""
    if not is_models_own(kind):
        return {}
    folder = Path(inspect.getfile(kind)).parent
    return {path.name: sha256(path) for path in sorted(folder.glob("*.py"))}


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Return a digest of the code that makes rows: a checkout changes under one version."""
    package = Path(runtime.__file__).parent
    digest = hashlib.sha256(runtime.__version__.encode())
    rooms = (package / "tuning" / "data", package / "chat_template")
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class RowCache:
    """The entries below one folder."""

    folder: Path

    def read(self, key: str) -> EncodedData | None:
        """Return the entry of `key`; None where there is none, or a damaged one, which is removed."""
        path = self.folder / key
        try:
            if not path.is_dir() or not self._is_private():
                return None
            found = encoded.read(path)
        except OSError as error:
            reason = disk_failure(error, self.folder) or error
            log.info("no encoded rows of earlier jobs are read: %s", reason)
            return None
        except DataError as error:
            if path.is_dir():  # another job may have removed it
                log.warning("the encoded rows of an earlier run are damaged and are made anew (%s)", error)
                shutil.rmtree(path, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the entry that was used last is the last to go
        return found

    def take(self, key: str, target: Path) -> EncodingFacts | None:
        """Make the entry of `key` the new folder `target`; None where there is none, or no more.

        Another job may remove an entry at any time. OSError for a full disk.
        """
        path = self.folder / key
        if (found := self.read(key)) is None:
            return None
        try:
            with new_folder(target) as made:
                link_files(path, made)
        except OSError as error:
            if isinstance(disk_failure(error), CapacityError):
                raise
            return None
        return found.facts

    def keep(self, key: str, made: Path) -> None:
        """Keep the rows in the folder `made` for later jobs, where there is room; nothing fails if not."""
        path = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists() or not self._is_private():
                return
            size = sum(file.stat().st_size for file in made.iterdir())
            if not self._make_room(size):
                return
            with new_folder(path) as scratch:
                link_files(made, scratch)
        except OSError as error:
            reason = disk_failure(error, self.folder) or error
            log.info("the encoded rows are not kept for later jobs: %s", reason)

    def _is_private(self) -> bool:
        """Return whether nobody else can have written here; what is not private is not used."""
        status = self.folder.stat()
        private = status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if not private:
            log.warning(
                "%s keeps no encoded rows: others may write to it; chmod 700, or name another data.cache",
                self.folder,
            )
        return private

    def _make_room(self, size: int) -> bool:
        """Remove the entries used longest ago until `size` more bytes fit; return whether they do."""
        entries = sorted(self._entries())
        total = sum(entry_bytes for _, entry_bytes, _ in entries)
        most = min(MOST_BYTES, int((shutil.disk_usage(self.folder).free + total) * FREE_SHARE))
        if size > most:
            log.info(
                "the encoded rows (%s) are not kept for later jobs: at most %s are",
                *map(show_bytes, (size, most)),
            )
            return False
        removed = 0
        for _, entry_bytes, path in entries:
            if total + size <= most:
                break
            shutil.rmtree(path, ignore_errors=True)
            total, removed = total - entry_bytes, removed + 1
        if removed:
            log.info("removed the encoded rows of %s from %s", counted(removed, "earlier job"), self.folder)
        return True

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each entry was used, its bytes and its folder; remove those that were abandoned."""
        remove_abandoned(self.folder)
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                used = path.stat().st_mtime
                if path.name.endswith(".part"):  # another job is writing it
                    continue
                yield used, sum(file.stat().st_size for file in path.iterdir()), path


def new_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Yield a new folder for encoded rows, of its owner alone, that replaces `path` when the block ends well.

    Not synced: whoever reads the rows checks their digests.
    """
    return atomic_folder(path, synced=False, mode=0o700)


def link_files(source: Path, target: Path) -> None:
    """Make the files of `source` those of `target` too: the same ones where one file system holds both."""
    for name in (ROWS, FACTS):
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
            (target / name).chmod(0o600)
