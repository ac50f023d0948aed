"""Environment variables that a shell on the way dropped: dash passes no name with '-' or '.' to its children.

An adapter's strength is the variable named like the adapter, and adapters have such names. The shell's own
environment in /proc still holds it. Start at `restore`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def restore(
    environ: Mapping[str, str], names: Iterable[str], *, pid: int | None = None, proc: Path = Path("/proc")
) -> dict[str, str]:
    """Return `environ` with those of `names` that it lacks and that a parent process was started with."""
    restored = dict(environ)
    missing = {name for name in names if name not in restored}
    parent = os.getppid() if pid is None else pid
    while missing and parent > 0:
        theirs = _environ_of(proc / str(parent) / "environ")
        restored.update({name: theirs[name] for name in missing & theirs.keys()})
        missing -= theirs.keys()
        parent = _parent_of(proc / str(parent) / "stat")
    return restored


def _environ_of(path: Path) -> dict[str, str]:
    try:
        entries = path.read_bytes().split(b"\0")
    except OSError:  # another user's process, or one that has ended
        return {}
    pairs = (entry.decode("utf-8", "surrogateescape").partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _parent_of(path: Path) -> int:
    try:
        # "pid (name) state ppid …"; the name may hold spaces and brackets.
        return int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
