"""The server's side of the host and of the processes of forms: started, asked, killed.

Masks are computed while the model runs its next step: `take` only sends, `allowed` waits for what came of it.
Does not know requests or caches. Start at `FormHost.fork`, then `FormProcess`.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runtime import forks
from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output import forms, host, limits

MODULE = "runtime.serving.structured_output.host"
"""What the host runs."""


class FormHost:
    """The process with the vocabulary; started when it is first needed, and again where it has ended."""

    def __init__(self, vocabulary: Callable[[], str], end_ids: list[int]) -> None:
        """`vocabulary` returns the tokenizer as JSON text; it is called for every start."""
        head = json.dumps({"end_ids": end_ids}).encode()
        self._host = forks.ForkHost(MODULE, "compiles schemas", lambda: (head, vocabulary().encode()))
        self._spare: FormProcess | None = None
        self._lock = threading.Lock()
        self._closed = False

    def fork(self) -> "FormProcess":
        """Return a process for one form; blocks while the vocabulary is sent, where that is due."""
        with self._lock:
            ready, self._spare = self._spare, None
        if ready is None or ready.has_ended():
            ready = FormProcess(self._host.fork())
        spare = FormProcess(self._host.fork())  # the next form need not wait for the fork
        with self._lock:
            if self._spare is None and not self._closed:
                self._spare = spare
        return ready

    def start(self) -> None:
        """Start the host unless it runs."""
        self._host.start()

    def close(self) -> None:
        """End the host; processes of forms end by themselves, or with their limits."""
        self._closed = True
        self._spare = None
        self._host.close()


class FormProcess:
    """One form in its process. Compile once, from an event loop; then answers, from any thread."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._pid = 0
        self._numbers = itertools.count()
        self._answers: set[int] = set()
        self._replies: dict[int, tuple[int, bytes]] = {}
        """Of those answers; what comes for one that has ended is dropped."""
        self._lock = threading.Lock()
        self.ended = False
        """Whether it was killed, or has ended by itself."""

    def has_ended(self) -> bool:
        """Return whether a process that was asked for nothing has ended."""
        try:
            return not self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:  # it has not begun
            return False
        except OSError:
            return True

    async def compile(self, constraint: Constraint) -> dict[str, Any]:
        """Return what the process says of the form; EOFError or OSError where it has ended before."""
        loop = asyncio.get_running_loop()
        self._channel.setblocking(False)
        self._pid = json.loads(await self._next(loop))["pid"]
        job = json.dumps(asdict(constraint)).encode()
        await loop.sock_sendall(self._channel, forks.LENGTH.pack(len(job)) + job)
        reply = json.loads(await self._next(loop))
        self._channel.settimeout(limits.MASK_WALL_S)
        return dict(reply)

    async def _next(self, loop: asyncio.AbstractEventLoop) -> bytes:
        async def exactly(length: int) -> bytes:
            data = bytearray()
            while len(data) < length:
                part = await loop.sock_recv(self._channel, length - len(data))
                if not part:
                    raise EOFError
                data += part
            return bytes(data)

        (length,) = forks.LENGTH.unpack(await exactly(forks.LENGTH.size))
        return await exactly(length)

    def begin(self, param: str) -> "AnswerMask":
        """Return the mask of one more answer."""
        number = next(self._numbers)
        self._answers.add(number)
        self.send(host.BEGIN, number)
        return AnswerMask(self, number, param)

    def send(self, command: bytes, answer: int, token: int = 0) -> None:
        """Send a command; what a process that has ended does not read shows when its reply is waited for."""
        with contextlib.suppress(OSError):
            self._channel.sendall(host.COMMAND.pack(command, answer, token))

    def reply(self, answer: int) -> tuple[int, bytes]:
        """Return the next reply for `answer`: 1 and a mask, or 0 and a text.

        Raises EOFError or OSError where the process has ended, or was killed for taking too long.
        """
        with self._lock:
            while answer not in self._replies:
                try:
                    message = forks.read(self._channel)
                except (EOFError, OSError):
                    self.kill()
                    raise
                number, fine = host.REPLY.unpack_from(message)
                if number in self._answers:
                    self._replies[number] = fine, message[host.REPLY.size :]
            return self._replies.pop(answer)

    def forget(self, answer: int) -> None:
        """Let go of an answer that has ended."""
        self._answers.discard(answer)
        self._replies.pop(answer, None)
        self.send(host.END, answer)

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self.ended = True
        if self._pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)  # wakes who waits for it; closing would not

    def __del__(self) -> None:
        """End the process with the last request that needs it: it reads the end of its channel."""
        self._channel.close()


class AnswerMask:
    """One answer's position in its form; the engine's `Mask`."""

    def __init__(self, process: FormProcess, answer: int, param: str) -> None:
        self._process, self._answer, self._param = process, answer, param

    def allowed(self) -> bytes:
        """Return one byte per token, 0 where it may not come next; RequestError where a limit was reached."""
        import numpy as np

        try:
            fine, payload = self._process.reply(self._answer)
        except (EOFError, OSError):
            raise self._failed(
                f"too complex: one token took more than {limits.MASK_CPU_S} s of processor time or "
                f"{limits.MEMORY_BYTES >> 20} MiB"
            ) from None
        if not fine:
            raise self._failed(forms.said(payload.decode("utf-8", "replace")))
        return np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little").tobytes()

    def take(self, token: int) -> None:
        """Advance past `token`; its mask is computed while the model runs."""
        self._process.send(host.TAKE, self._answer, token)

    def _failed(self, reason: str) -> RequestError:
        return RequestError(f"'{self._param}': {reason}", param=self._param)

    def __del__(self) -> None:
        """Let the process forget the answer."""
        self._process.forget(self._answer)
