"""The processes in which templates are rendered, seen from where the texts are wanted: asked, kept, killed.

One process a template, and one more for each further thread that renders it at the same time, so that a
template takes nobody's time but that of who asks for it. Does not know tokenizers or features. Start at
`Renderer.facts` and `Renderer.render`.
"""

import atexit
import json
import os
import socket
import struct
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from runtime import forks
from runtime.chat_template import protocol
from runtime.errors import (
    ConfigError,
    TemplateLimitError,
    TemplateLongError,
    TemplateRefusedError,
    one_line,
)

MODULE = "runtime.chat_template.host"
LONGEST_TEMPLATE = 1 << 20
"""Characters; the largest public ones have 20,000."""
KEPT = 64
"""Processes that wait for the next conversation; each has some 3 MB of its own."""
SLOW_FOR_S = 60.0
"""How long a template counts as slow that was ended by its limits."""
LIVES_S = 1.0
"""How long after an answer a process is taken to live: nothing but a lack of memory ends it."""
_WALL = struct.pack("ll", int(protocol.WALL_S), 0)


@dataclass(frozen=True, slots=True)
class JinjaFacts:
    """What Jinja knows of a template without rendering it."""

    words: frozenset[str] = frozenset()
    """The texts in it that may be names of roles."""
    marks_answers: bool = False


@dataclass(slots=True)
class _Process:
    """A copy of the host with one template compiled."""

    channel: socket.socket
    facts: JinjaFacts = field(default_factory=JinjaFacts)
    asked_s: float = 0.0
    """time.monotonic() when it was last asked."""

    def ask(self, message: bytes, most_bytes: int) -> tuple[bytes, bytes]:
        """Return how a reply begins and what follows; EOFError or OSError where the process has ended."""
        forks.send(self.channel, message)
        reply = forks.reply(self.channel, most_bytes)
        self.asked_s = time.monotonic()
        return reply[:1], reply[1:]


class Renderer:
    """Renders with any template, from any thread; `close` it in the end."""

    def __init__(self) -> None:
        self._host = forks.ForkHost(MODULE, "renders chat templates")
        self._idle: OrderedDict[str, list[_Process]] = OrderedDict()
        """By template, the one used last at the end."""
        self._slow: dict[str, float] = {}
        """time.monotonic() when a template was ended by its limits."""
        self._lock = threading.Lock()

    def facts(self, template: str) -> JinjaFacts:
        """Return what Jinja knows of a template; raises as `render` does."""
        process = self._take(template)
        self._put(template, process)
        return process.facts

    def render(self, template: str, job: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and its marked answers where the job asks for them.

        The job is described in protocol.py. Raises ConfigError for what is no template, TemplateRefusedError
        for what it refuses, TemplateLongError for a longer text, TemplateLimitError where it took too much.
        """
        try:
            message = protocol.dumped(job)
        except (ValueError, RecursionError) as error:
            raise TemplateRefusedError(one_line(error, 200)) from None
        process = self._take(template)
        try:
            kind, payload = process.ask(message, protocol.reply_bytes(job["most"]))
        except (EOFError, OSError):
            raise self._ended(template, process) from None
        except BaseException:
            process.channel.close()
            raise
        self._put(template, process)
        if kind == protocol.LONG:
            raise TemplateLongError(f"its text is longer than {job['most']} characters")
        if kind == protocol.REFUSED:
            raise TemplateRefusedError(one_line(payload.decode(*protocol.ENCODING), 200))
        if kind == protocol.MARKED:
            text, answers = json.loads(payload)
            return text, [(start, end) for start, end in answers]
        return payload.decode(*protocol.ENCODING), []

    def is_slow(self, template: str) -> bool:
        """Return whether a template was ended by its limits lately."""
        ended_s = self._slow.get(template)
        return ended_s is not None and time.monotonic() - ended_s < SLOW_FOR_S

    def close(self) -> None:
        """End all processes."""
        self._host.close()
        with self._lock:
            for processes in self._idle.values():
                for process in processes:
                    process.channel.close()
            self._idle.clear()

    def _take(self, template: str) -> _Process:
        """Return a process for a template that nobody else asks, and that has not ended."""
        while True:
            with self._lock:
                idle = self._idle.get(template, [])
                process = idle.pop() if idle else None
                if not idle:
                    self._idle.pop(template, None)
            if process is None:
                return self._started(template)
            if time.monotonic() - process.asked_s < LIVES_S or not _has_ended(process.channel):
                return process
            process.channel.close()

    def _put(self, template: str, process: _Process) -> None:
        """Keep a process for the next conversation, and end those that were not asked for longest."""
        ended: list[_Process] = []
        with self._lock:
            self._idle.setdefault(template, []).append(process)
            self._idle.move_to_end(template)
            while sum(map(len, self._idle.values())) > KEPT:
                oldest = next(iter(self._idle))
                ended += self._idle.pop(oldest)
        for each in ended:
            each.channel.close()

    def _started(self, template: str) -> _Process:
        if len(template) > LONGEST_TEMPLATE:
            raise ConfigError(
                f"the chat template has {len(template)} characters, at most {LONGEST_TEMPLATE} are read"
            )
        channel = self._host.fork()
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _WALL)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _WALL)
        process = _Process(channel)
        try:
            kind, payload = process.ask(template.encode(*protocol.ENCODING), 8 * LONGEST_TEMPLATE + (1 << 16))
        except (EOFError, OSError):
            limit = self._ended(template, process)
            raise ConfigError(f"the chat template cannot be compiled: {limit}") from None
        if kind == protocol.BROKEN:
            channel.close()
            said = one_line(payload.decode(*protocol.ENCODING), 200)
            raise ConfigError(f"the chat template is broken {said}")
        read = json.loads(payload)
        process.facts = JinjaFacts(frozenset(read["words"]), bool(read["marks_answers"]))
        return process

    def _ended(self, template: str, process: _Process) -> TemplateLimitError:
        """Return the failure of a template whose process has ended, or does not answer."""
        process.channel.close()  # which ends it where it still runs
        with self._lock:
            self._slow[template] = time.monotonic()
            while len(self._slow) > KEPT:
                del self._slow[next(iter(self._slow))]
        return TemplateLimitError(
            f"it takes more than {protocol.CPU_S:g} s of processor time or {protocol.MEMORY_BYTES >> 20} MiB"
        )


def _has_ended(channel: socket.socket) -> bool:
    """Return whether a process that was asked for nothing has ended."""
    try:
        channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True  # its end, or what nobody asked for


def shared() -> Renderer:
    """Return the renderer of this process; one that has forked has another."""
    return _of(os.getpid())


@cache  # one that was inherited stays: its processes are another's
def _of(process: int) -> Renderer:
    renderer = Renderer()
    atexit.register(renderer.close)
    return renderer
