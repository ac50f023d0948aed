"""Variables that a shell dropped on the way: dash hands no name with '-' or '.' on to what it starts.

An adapter's strength is the variable named like the adapter, and adapters have such names. A shell's own
block in /proc still holds it. Start at `recover`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def recover(
    environ: Mapping[str, str], names: Iterable[str], *, pid: int | None = None, proc: Path = Path("/proc")
) -> dict[str, str]:
    """Return `environ` with those of `names` that it lacks and a parent process was started with."""
    found = dict(environ)
    missing = {name for name in names if name not in found}
    parent = os.getppid() if pid is None else pid
    while missing and parent > 0:
        block = _block(proc / str(parent) / "environ")
        found.update({name: block[name] for name in missing & block.keys()})
        missing -= block.keys()
        parent = _parent(proc / str(parent) / "stat")
    return found


def _block(path: Path) -> dict[str, str]:
    try:
        entries = path.read_bytes().split(b"\0")
    except OSError:  # another user's process, or one that has ended
        return {}
    pairs = (entry.decode("utf-8", "surrogateescape").partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _parent(path: Path) -> int:
    try:
        # "pid (name) state ppid …"; the name may hold spaces and brackets.
        return int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
