"""Runs functions in processes that meet a fault at a chosen operation on files (file_faults.c).

A `Victim` imports once and forks for each run, which costs what its work costs. Start at `Victim.run`.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runtime.files import sha256

NOTHING, KILL, TERM, FAIL = range(4)
"""What happens at the chosen operation; FAIL: it and all later ones that need the disk fail."""


@dataclass(frozen=True)
class Fault:
    """What happens to a process at its operation `at` (1 is the first) on files below a folder."""

    what: int = NOTHING
    at: int = 0
    errno: int = 0


UNDISTURBED = Fault()


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (minus the signal that ended it) and all that it wrote."""

    status: int
    text: str
    operations: list[str]
    """Of files below the folder, up to the fault."""

    @property
    def lines(self) -> list[str]:
        """What a person reads: lines that are no log records."""
        return [line for line in self.text.splitlines() if not line.startswith("{")]


class Victim:
    """A process with `modules` imported and the faults preloaded, in which each run is a fork."""

    def __init__(self, folder: Path, modules: Sequence[str], **environment: str) -> None:
        library = folder / "file_faults.so"
        source = Path(__file__).with_name("file_faults.c")
        subprocess.run(
            ["cc", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-o", str(library), str(source), "-ldl"],
            check=True,
        )
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crash_points", *modules],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0

    def run(self, function: str, *arguments: object, below: Path, fault: Fault = UNDISTURBED) -> Ended:
        """Call `function` (module:name) with JSON-able arguments; operations below a folder count."""
        output, trace = self._folder / "output", self._folder / "operations"
        request = {
            "function": function,
            "arguments": arguments,
            "below": str(below.resolve()),
            "fault": asdict(fault),
            "output": str(output),
            "trace": str(trace),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return Ended(status, output.read_text(errors="replace"), trace.read_text().splitlines())


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file below `folder` by its path, and "/" for a folder."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: sha256(path) if path.is_file() else "/" for name, path in found.items()}


def command_line(*words: str) -> None:
    """Be the process `runtime WORDS`."""
    from runtime.cli.main import main

    sys.argv = ["runtime", *words]
    main()


def _child(request: dict[str, Any], faults: ctypes.CDLL) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, name in ((1, "output"), (2, "output"), (3, "trace")):
        opened = os.open(
            request[name], os.O_WRONLY | os.O_CREAT | (os.O_APPEND if number == 2 else os.O_TRUNC)
        )
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(3, False)
    module, name = request["function"].split(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    fault = request["fault"]
    faults.file_faults_arm(request["below"].encode(), fault["what"], fault["at"], fault["errno"], 3)
    status = 0
    try:
        function(*request["arguments"])
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    """Fork for each request that arrives, and answer with the child's exit status."""
    faults = ctypes.CDLL(None)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 3)  # kept free for the trace
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _child(json.loads(line), faults)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
