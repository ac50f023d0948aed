"""Where requests meet an engine's thread: the bounded queue, who is running, which adapter is in use.

Everything here may be called from any thread. Does not know models or how tokens are made. Start at
`RequestQueue.submit` (the event loop's side) and `RequestQueue.take` (the engine thread's side).
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import replace

from runtime.errors import OverloadedError, UnavailableError, UnknownModelError
from runtime.serving.engine.protocol import FinishReason, Request, Start, Token


class RequestHandle:
    """A request in flight; made in the event loop that reads the answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        """Set from any thread; the engine looks at it before each step."""
        self.start: Start | None = None
        """Set with the row, posted with the first token."""
        self._submitted_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Token | Exception] = asyncio.Queue()

    def begin(self) -> None:
        """Note that the request has a row."""
        self.start = Start(queued_s=time.monotonic() - self._submitted_s, cached_tokens=0)

    def found(self, cached_tokens: int) -> None:
        """Note how much of the prompt was in the cache."""
        if self.start is not None:
            self.start = replace(self.start, cached_tokens=cached_tokens)

    def post(self, item: Token | Exception) -> None:
        """Hand a token, the end or a failure to the reader; from any thread."""
        if isinstance(item, Token) and self.start is not None:
            item, self.start = replace(item, start=self.start), None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    async def read(self, on_leave: Callable[[], None]) -> AsyncIterator[Token]:
        """Yield tokens until the end; raise what was posted as a failure. `on_leave` runs however it ends."""
        try:
            while True:
                item = await self._outbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.id is None:
                    return
        finally:
            on_leave()


LAST_STEP_S = 10.0
"""How long a closed engine is waited for; a step of a large model on a CPU takes seconds."""


class RequestQueue:
    """Takes requests in order of arrival; at most `queue` wait while `rows` are being answered."""

    def __init__(self, *, rows: int, queue: int, adapters: Callable[[], tuple[str, ...]]) -> None:
        self._rows = rows
        self._queue = queue
        self._adapters = adapters
        self._waiting: deque[RequestHandle] = deque()
        self._running: list[RequestHandle] = []
        self._in_flight: Counter[str | None] = Counter()
        self._leaving: set[str] = set()
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._progress = time.monotonic()
        self._open = True
        self._changed = threading.Condition()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request` and return its answer; see `Engine.submit` for what is refused."""
        with self._changed:
            if not self._open:
                raise UnavailableError("the engine has stopped")
            if request.adapter is not None and request.adapter not in self.adapters():
                raise UnknownModelError(f"adapter '{request.adapter}' is not resident")
            if len(self._waiting) >= self._queue + self._rows - len(self._running):
                raise OverloadedError(f"{self._queue} requests are waiting already; try again shortly")
            ticket = RequestHandle(request)
            self._in_flight[request.adapter] += 1
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket.read(on_leave=lambda: self._drop(ticket))

    def take(self, *, wait: bool) -> list[RequestHandle]:
        """Run errands, then return the requests that may start now; with `wait`, not before there is one.

        Empty also when only an errand was to do, or the desk was closed.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(self._due)
                self._progress = time.monotonic()
        self.run_errands()
        with self._changed:
            started = []
            while self._open and self._waiting and len(self._running) < self._rows:
                started.append(self._waiting.popleft())
                started[-1].begin()
                self._running.append(started[-1])
            return started

    def _due(self) -> bool:
        """Whether there is something to do: an errand, or a request for which there is a row."""
        free = len(self._running) < self._rows
        return bool(self._errands) or (bool(self._waiting) and free) or not self._open

    def errand(self, work: Callable[[], None]) -> None:
        """Have the engine's thread do `work` between two steps, and wait; raises what `work` raises.

        Not in the caller's thread, because each thread that runs torch's parallel operators on a CPU keeps
        a pool of its own, and with more pools than cores OpenMP stops spinning: every step, for ever
        after, then takes twice as long (tests/bench/RESULTS.md).
        """
        done: Future[None] = Future()
        with self._changed:
            if not self._open:
                raise UnavailableError("the engine has stopped")
            self._errands.append((work, done))
            self._changed.notify_all()
        done.result()

    def run_errands(self) -> None:
        """Do what was sent for, in the engine's thread."""
        while True:
            with self._changed:
                if not self._errands:
                    return
                work, done = self._errands.popleft()
            try:
                done.set_result(work())
            except Exception as error:  # belongs to whoever sent the errand
                done.set_exception(error)

    def finish(self, ticket: RequestHandle, end: FinishReason | Exception) -> None:
        """Give a running request its end or failure, and its row to the next."""
        with self._changed:
            if ticket in self._running:
                self._running.remove(ticket)
                self._retire(ticket, end)

    def progress(self) -> None:
        """Note that a step was made."""
        self._progress = time.monotonic()

    def cancel(self, request_id: str) -> None:
        """Stop the request of that id, waiting or running."""
        with self._changed:
            for ticket in (*self._waiting, *self._running):
                if ticket.request.id == request_id:
                    self._drop(ticket)

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that new requests may name."""
        return tuple(name for name in self._adapters() if name not in self._leaving)

    def let_go(self, name: str) -> None:
        """Refuse new requests for adapter `name` and wait until none is in flight."""
        with self._changed:
            if name not in self.adapters():
                raise UnknownModelError(f"adapter '{name}' is not resident")
            self._leaving.add(name)
            self._changed.wait_for(lambda: not self._in_flight[name] or not self._open)

    def forgotten(self, name: str) -> None:
        """Note that the adapter let go is out of memory; its name may be used again."""
        self._leaving.discard(name)

    def close(self, end: FinishReason | Exception) -> None:
        """Refuse what comes; what waits ends now, what runs is marked for the thread's next step."""
        with self._changed:
            self._open = False
            while self._waiting:
                self._retire(self._waiting.popleft(), end)
            for ticket in self._running:
                ticket.cancelled = True
            while self._errands:
                self._errands.popleft()[1].set_exception(UnavailableError("the engine has stopped"))
            self._changed.notify_all()

    def abandon(self, end: Exception) -> None:
        """The thread is dying: close, and give everything that runs the same failure."""
        self.close(end)
        for ticket in tuple(self._running):
            self.finish(ticket, end)

    @property
    def is_open(self) -> bool:
        """False once closed or abandoned."""
        return self._open

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def last_progress_s(self) -> float:
        """time.monotonic() of the last step, or now when there is nothing to do."""
        idle = not self._running and not self._waiting
        return time.monotonic() if idle else self._progress

    def _drop(self, ticket: RequestHandle) -> None:
        """The reader wants no more: a waiting request ends here, a running one at the next step."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._retire(ticket, "cancelled")

    def _retire(self, ticket: RequestHandle, end: FinishReason | Exception) -> None:
        self._in_flight[ticket.request.adapter] -= 1
        ticket.post(Token(None, end) if isinstance(end, str) else end)
        self._changed.notify_all()
