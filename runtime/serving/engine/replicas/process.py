"""The process of one replica as the server sees it: started, written to, read from, ended.

Messages go both ways over its standard input (child.py); it ends when the server's end closes. Does not know
what messages mean. Start at `ReplicaProcess`.
"""

import contextlib
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from runtime import child
from runtime.errors import Failure, kind_of_exit
from runtime.serving.engine import failures

MODULE = "runtime.serving.replica"
"""What the process runs."""


class ReplicaProcess:
    """One process; nothing blocks but `wait`."""

    def __init__(
        self,
        name: str,
        environment: Mapping[str, str],
        *,
        on_message: Callable[[Any], None],
        on_end: Callable[[], None],
    ) -> None:
        """Start it with more variables; callbacks come from one thread, `on_end` as the last."""
        self.name = name
        """As in messages: "replica 1 of 2"."""
        self._process, here = child.start(MODULE, environment)
        self._channel: Connection[Any, Any] = Connection(here.detach())
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._on_message, self._on_end = on_message, on_end
        self._writer = threading.Thread(target=self._write, name="to replica", daemon=True)
        self._reader = threading.Thread(target=self._read, name="from replica", daemon=True)
        self._writer.start()
        self._reader.start()

    def send(self, message: object) -> None:
        """Send `message` after those before it; it is lost where the process has ended."""
        self._outgoing.put(message)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, timeout_s: float) -> None:
        """Wait until it has ended and everything that it sent is handled; kill it where that takes longer."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._outgoing.put(None)
        self._writer.join()
        self._channel.close()

    def end(self) -> Failure:
        """Return how a process that does not run any more has ended, as the failure of its exit status."""
        status = self._process.wait()
        kind = kind_of_exit(status)
        return kind(f"{self.name} {failures.how_ended(status)}")

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # it has ended, which the reader notices
            while (message := self._outgoing.get()) is not None:
                self._channel.send(message)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._on_message(self._channel.recv())
        # it has closed its end, which is the last that it does
        self._process.wait()
        self._on_end()
