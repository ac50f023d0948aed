"""Lists the files of a folder that is to be pushed: regular files, and links that stay inside it.

A link that leads out of the folder is not followed, which is logged; one that leads nowhere ends the push.
Reads names only. Start at `list_files`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from runtime.errors import ConfigError

MARKER = ".oci.json"
"""File by which `pull` recognises a folder that it made; it is never pushed."""

_WHITEOUT = ".wh."
_MOST_NAMED = 8

log = logging.getLogger(__name__)


def list_files(
    folder: Path,
    files: Sequence[str] | None = None,
    *,
    skip: Callable[[PurePosixPath], bool] = lambda path: False,
) -> list[str]:
    """Return the sorted relative paths of the files to push.

    files: paths relative to `folder`; every file below it when None, but for what `skip` says of a relative
    path, a folder's included. ConfigError when one is missing or leads out of `folder`, or there is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such directory, expected the folder to push")
    found = _walk(folder, skip) if files is None else [_checked(folder, name) for name in files]
    if not found:
        raise ConfigError(f"{folder}: holds no files to push")
    for name in found:
        if PurePosixPath(name).name.startswith(_WHITEOUT):
            raise ConfigError(f"{folder / name}: a name that removes files in an image; rename it")
        if not os.access(folder / name, os.R_OK):
            raise ConfigError(f"{folder / name}: not readable for this user; change its permissions")
    return sorted(set(found))


def named(names: Sequence[str]) -> str:
    """Return names for a message, the first few of many."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(sorted(names)[:_MOST_NAMED]) + more


def _checked(folder: Path, name: str) -> str:
    """Return one of the paths that the user named."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not _inside(folder / path, folder):
        raise ConfigError(f"{name}: leads out of {folder}; expected a path inside it")
    if not (folder / path).is_file():
        what = "is no file" if os.path.lexists(folder / path) else "no such file"
        raise ConfigError(f"{folder / path}: {what}, expected one for the image")
    return path.as_posix()


def _walk(folder: Path, skip: Callable[[PurePosixPath], bool]) -> list[str]:
    found, left_out = [], []
    for path in _below(folder, skip):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.exists():
            raise ConfigError(
                f"{path}: a link to {str(path.readlink())!r}, which does not exist; mend or remove it"
            )
        if path.is_file() and _inside(path, folder):
            found.append(name)
        else:
            left_out.append(name)
    if left_out:
        log.warning(
            "%s: links to folders or out of it, pipes and devices are not pushed: %s", folder, named(left_out)
        )
    return found


def _below(folder: Path, skip: Callable[[PurePosixPath], bool]) -> Iterator[Path]:
    """Yield all that is no folder below `folder`, links to folders included."""

    def fail(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); change its permissions")

    for above, folders, files in os.walk(folder, onerror=fail):
        here = Path(above)
        kept = [name for name in folders if not skip(PurePosixPath((here / name).relative_to(folder)))]
        folders[:] = [name for name in kept if not (here / name).is_symlink()]
        for name in (*files, *(name for name in kept if (here / name).is_symlink())):
            if name != MARKER and not skip(PurePosixPath((here / name).relative_to(folder))):
                yield here / name


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
