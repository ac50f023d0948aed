"""Processes that can be killed: a host that starts once with what all need, and a copy of it for each task.

A copy costs milliseconds, its end costs nobody else anything, and the kernel ends it where it takes too much.
The host holds a socket of the process it works for (child.py) and gets over it a socket for each copy. Does
not know what is done in one. Start at `ForkHost` there, at `serve` here.
"""

import contextlib
import gc
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from runtime import child
from runtime.errors import UnavailableError

LENGTH = struct.Struct("<I")
"""Before each message, in both directions."""
_AT_ONCE = 1 << 16


class ForkHost:
    """The host's side that asks: started when it is first needed, and again where it has ended."""

    def __init__(
        self, module: str, purpose: str, greeting: Callable[[], Iterable[bytes]] = lambda: ()
    ) -> None:
        """`module` calls `serve`; `greeting` makes what it reads first; `purpose` is for refusals."""
        self._module, self._purpose, self._greeting = module, purpose, greeting
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False

    def fork(self) -> socket.socket:
        """Return the socket of a new copy; UnavailableError where the host does not start."""
        for _ in range(2):  # a host that has ended since it was last asked shows only here
            here, there = socket.socketpair()
            with there:
                control = self.start()
                with contextlib.suppress(OSError):
                    socket.send_fds(control, [b"f"], [there.fileno()])
                    return here
            here.close()
            self._stop()
        raise UnavailableError(f"the process that {self._purpose} does not start; the log says why")

    def start(self) -> socket.socket:
        """Start the host unless it runs, and return the socket that asks it for copies."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the server is shutting down")
            if self._control is None or self._process is None or self._process.poll() is not None:
                self._control, self._process = self._spawn()
            return self._control

    def _spawn(self) -> "tuple[socket.socket, subprocess.Popen[bytes]]":
        process, here = child.start(self._module, without=child.SECRETS)
        with contextlib.suppress(OSError):
            for message in self._greeting():
                send(here, message)
        return here, process

    def _stop(self) -> None:
        with self._lock:
            control, process, self._control, self._process = self._control, self._process, None, None
        if control is not None:
            control.close()
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End the host; copies end by themselves, or with their limits."""
        self._closed = True
        self._stop()


def serve(control: socket.socket, work: Callable[[socket.socket], None]) -> None:
    """Fork for each socket that comes, and have the copy do `work` with it, until the other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # which also takes their exit statuses
    gc.freeze()
    while True:
        try:
            _, files, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            return
        if not files:
            return
        if os.fork() == 0:
            control.close()
            work(socket.socket(fileno=files[0]))
            os._exit(0)
        os.close(files[0])


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Have the kernel end this process where the block takes longer; no code of the block can prevent it."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory(most_bytes: int, niceness: int) -> None:
    """Let this copy take `most_bytes` beyond what it shares with the host, and the first to be ended."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + most_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(os.devnull).open("wb") as nothing:  # what is said in dying is not for the log
        os.dup2(nothing.fileno(), 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    os.nice(niceness)


def send(channel: socket.socket, message: bytes) -> None:
    """Send one message; OSError where the other end is gone."""
    channel.sendall(LENGTH.pack(len(message)) + message)


def reply(channel: socket.socket, most: int | None = None) -> bytes:
    """Return the message of an other end that sends none before it is asked again; raises as `read` does.

    A short one takes one call of the kernel.
    """
    data = channel.recv(_AT_ONCE)
    if len(data) < LENGTH.size:
        data += exactly(channel, LENGTH.size - len(data)) if data else b""
    if not data:
        raise EOFError
    (length,) = LENGTH.unpack_from(data)
    if most is not None and length > most:
        raise EOFError
    missing = length - (len(data) - LENGTH.size)
    return data[LENGTH.size :] + (exactly(channel, missing) if missing else b"")


def read(channel: socket.socket, most: int | None = None) -> bytes:
    """Return the next message, of at most `most` bytes.

    EOFError or OSError where the other end is gone, EOFError for a longer message.
    """
    (length,) = LENGTH.unpack(exactly(channel, LENGTH.size))
    if most is not None and length > most:
        raise EOFError
    return exactly(channel, length)


def exactly(channel: socket.socket, length: int) -> bytes:
    """Return the next `length` bytes; EOFError or OSError where the other end is gone."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)
