"""The processes that llguidance runs in: a host with the vocabulary, and a copy of it for each form.

The host reads the vocabulary once and forks for each form, so that a form costs milliseconds and its end
costs nobody else anything. A form's process compiles it, then computes masks for all answers that follow it;
the kernel ends it where one step takes too much processor time or memory. Runs as `python -m` this module,
with a socket as standard input. Does not know HTTP or engines. Start at `main`, then `FormWorker.run`.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError, one_line
from runtime.serving.engine import child
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output import forms, limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LENGTH = struct.Struct("<I")
"""Before each message, in both directions."""
COMMAND = struct.Struct("<cII")
"""To a form's process: what, the answer's number, a token."""
BEGIN, TAKE, END = b"B", b"T", b"E"
REPLY = struct.Struct("<IB")
"""From a form's process: the answer's number and 1 where a mask follows, 0 where a text says why not."""
NICENESS = 5
"""Of what computes masks, which answers wait for: below the server's threads where processors are short."""
COMPILE_NICENESS = 10
"""Of what compiles, which only its client waits for: many forms at once must not slow what is answered."""


def main() -> int:
    """Read the vocabulary, then fork for each form until the server closes its end."""
    control = child.begin()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # which also takes their exit statuses
    try:
        head = json.loads(read(control))
        tokenizer = read(control).decode()
    except (EOFError, OSError):  # the server has ended by now
        return 0
    from llguidance import LLTokenizer

    tokens = LLTokenizer(tokenizer, eos_token=head["end_ids"] or None)
    del tokenizer
    gc.freeze()
    while True:
        try:
            _, files, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            return 0
        if not files:
            return 0
        if os.fork() == 0:
            control.close()
            FormWorker(socket.socket(fileno=files[0]), tokens).run()
            os._exit(0)
        os.close(files[0])


class FormWorker:
    """One form and the answers that follow it, in a process that the host has forked."""

    def __init__(self, channel: socket.socket, tokens: "LLTokenizer") -> None:
        self._channel = channel
        self._tokens = tokens
        self._answers: dict[int, LLMatcher] = {}

    def run(self) -> None:
        """Compile what comes first, then answer commands until the server closes its end."""
        try:
            _limit_memory()
            send(self._channel, json.dumps({"pid": os.getpid()}).encode())
            job = json.loads(read(self._channel))
            reply, matcher = self._compile_below(Constraint(**job))
            send(self._channel, json.dumps(reply).encode())
            while matcher is not None:
                self._carry_out(matcher, *COMMAND.unpack(_exactly(self._channel, COMMAND.size)))
        except (EOFError, OSError):  # the server has closed its end
            return

    def _compile_below(self, constraint: Constraint) -> "tuple[dict[str, Any], LLMatcher | None]":
        """Compile in a thread, which ends with its niceness: without privileges none is taken back."""

        def compile_() -> "tuple[dict[str, Any], LLMatcher | None]":
            os.nice(COMPILE_NICENESS - NICENESS)  # of this thread alone, on Linux
            return self._compile(constraint)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(compile_).result()

    def _compile(self, constraint: Constraint) -> "tuple[dict[str, Any], LLMatcher | None]":
        """Return what the server is told, and the matcher of a form that can be followed."""
        try:
            with _processor_time(limits.COMPILE_CPU_S):
                form = forms.form_of(constraint)
                matcher = forms.matcher(form, self._tokens, constraint)
                forms.mask(matcher, constraint)
        except RequestError as error:
            return {"error": str(error)}, None
        except Exception as error:  # llguidance's own; a form is not worth the server's end
            return {"error": f"'{constraint.param}': {one_line(error)}"}, None
        matcher.reset()
        return {"relaxed": form.relaxed, "value": form.value}, matcher

    def _carry_out(self, matcher: "LLMatcher", command: bytes, answer: int, token: int) -> None:
        if command == END:
            self._answers.pop(answer, None)
            return
        with _processor_time(limits.MASK_CPU_S):
            try:
                if command == BEGIN:
                    self._answers[answer] = matcher.deep_copy()
                else:
                    self._answers[answer].consume_token(token)
                mask = self._answers[answer].compute_bitmask()
                error = self._answers[answer].get_error()
            except Exception as failure:  # llguidance's own
                error = str(failure)
        self._reply(answer, not error, error.encode() if error else mask)

    def _reply(self, answer: int, fine: bool, payload: bytes) -> None:
        send(self._channel, REPLY.pack(answer, fine) + payload)


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Have the kernel end this process where the block takes longer; no code of the block can prevent it."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    """Let this process take MEMORY_BYTES beyond what it shares with the host, and the first to be ended."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + limits.MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(os.devnull).open("wb") as nothing:  # what is said in dying is not for the log
        os.dup2(nothing.fileno(), 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    os.nice(NICENESS)


def send(channel: socket.socket, message: bytes) -> None:
    """Send one message; OSError where the other end is gone."""
    channel.sendall(LENGTH.pack(len(message)) + message)


def read(channel: socket.socket) -> bytes:
    """Return the next message; EOFError or OSError where the other end is gone."""
    (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
    return _exactly(channel, length)


def _exactly(channel: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)


if __name__ == "__main__":
    raise SystemExit(main())
