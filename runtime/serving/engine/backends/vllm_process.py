"""A vLLM server as a child process on a Unix socket: found, started, waited for, watched, ended.

The socket lies in a private directory, so it takes no port and needs no key. Does not know models, requests
or adapters. Start at `VllmProcess`.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from runtime.errors import ConfigError
from runtime.serving.engine import failures

log = logging.getLogger(__name__)

POLL_S = 0.25
"""How often a starting server is polled for readiness."""
STOP_S = 10.0
"""Time that vLLM is given to end after SIGTERM."""
LAST_LINES = 200
"""Lines of its log that are kept, to report what it ended with."""

ERROR_LINE = re.compile(r"\w*(Error|error|Exception): ")

ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the weights are on the disk
    "PYTHONUNBUFFERED": "1",
}


def find(program: str) -> str:
    """Return the path of vLLM's command, on PATH or beside this Python; ConfigError when it is not there."""
    beside = Path(sys.executable).parent / program
    found = shutil.which(program) or (str(beside) if os.access(beside, os.X_OK) else None)
    if found is None:
        raise ConfigError(
            f"--engine vllm: no program '{program}'; install vLLM in a virtual environment of its own "
            "(it wants its own torch) and name it with --set vllm.program=DIRECTORY/bin/vllm"
        )
    return found


class VllmProcess:
    """One running `vllm serve`."""

    def __init__(self, program: str, arguments: Sequence[str]) -> None:
        """Start it; returns at once. ConfigError when there is no such program."""
        self._found = find(program)
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-")
        self.socket = str(Path(self._folder.name) / "socket")
        self._command = [*_prefix(ENVIRONMENT), self._found, "serve", *arguments, f"--uds={self.socket}"]
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._closing = False
        self._started = threading.Event()
        self._on_end: Callable[[str], None] = lambda _: None
        # The thread that starts it lives as long as it does: a parent's death is that of the starting thread.
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()
        self._started.wait()

    def wait_ready(self) -> None:
        """Block until it answers; ConfigError with its last log line when it ends instead."""
        began = time.monotonic()
        with self.client(timeout_s=5.0) as client:
            while True:
                if (status := self._process.poll()) is not None:
                    raise ConfigError(f"vLLM ended with status {status} while it loaded: {self._reason()}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(POLL_S)
        log.info("vLLM is ready after %.1f s", time.monotonic() - began)

    def on_end(self, callback: Callable[[str], None]) -> None:
        """Call `callback` with a description, from a thread, when the process ends without `close`."""
        self._on_end = callback
        if not self.alive:
            callback(self._end())

    def client(self, *, timeout_s: float) -> httpx.Client:
        """Return a client for calls that block."""
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=self.socket), base_url="http://vllm", timeout=timeout_s
        )

    def async_client(self) -> httpx.AsyncClient:
        """Return a client for answers: any number at a time, without a timeout."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        transport = httpx.AsyncHTTPTransport(uds=self.socket, limits=limits)
        return httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=httpx.Timeout(None))

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it: SIGTERM, then SIGKILL."""
        self._closing = True
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        self._kill()
        self._thread.join(STOP_S)
        self._folder.cleanup()

    def _run(self) -> None:
        """Start the process, wait until it ends, and call back."""
        self._process = subprocess.Popen(  # noqa: S603 - the program the user named
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C on a terminal must reach this server alone
        )
        self._started.set()
        reader = threading.Thread(target=self._read, name="vllm-log", daemon=True)
        reader.start()
        self._process.wait()
        self._kill()
        reader.join()
        if not self._closing:
            self._on_end(self._end())

    def _read(self) -> None:
        """Log its output at DEBUG."""
        with self._process.stdout or contextlib.nullcontext(()) as lines:
            for line in lines:
                self._last.append(line.rstrip())
                log.debug("vLLM: %s", line.rstrip())

    def _kill(self) -> None:
        """Kill what is left of its process group, workers included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end(self) -> str:
        status = self._process.wait()
        return f"vLLM {failures.how_ended(status)}: {self._reason()}"

    def _reason(self) -> str:
        """Return the last line of its log that names an error, else the last line."""
        lines = [line for line in self._last if line.strip()]
        errors = [line for line in lines if ERROR_LINE.search(line)]
        return " ".join((errors or lines or ["it wrote no log line"])[-1].split())[-300:]


def _prefix(environment: Mapping[str, str]) -> list[str]:
    """Return the prefix of a command that sets variables and ends it when its parent thread has ended.

    util-linux's setpriv does the latter; without it, a server that is killed leaves vLLM running.
    """
    prefix = ["env", *(f"{name}={value}" for name, value in environment.items())]
    guard = shutil.which("setpriv")
    return [*prefix, guard, "--pdeathsig", "TERM"] if guard else prefix
