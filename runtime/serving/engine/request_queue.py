"""Where requests meet an engine's thread: the bounded queue, what runs, which adapters are in use.

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

from runtime.serving.engine import failures
from runtime.serving.engine.fair_queue import FairQueue
from runtime.serving.engine.protocol import FinishReason, Request, Start, Stats, Token

End = FinishReason | Token | Exception
"""How an answer ends: why, the token that says so, or a failure."""

LAST_STEP_S = 10.0
"""How long a closed engine is waited for; a step of a large model on a CPU takes seconds."""


class RequestHandle:
    """A request in flight; made in the event loop that reads the answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        """Set from any thread; the engine checks it before each step."""
        self.on_cancel: Callable[[], None] = lambda: None
        """Called, from any thread, when `cancelled` is set on a running request; must not block."""
        self._start: Start | None = None
        """Set by `start`, posted with the first token."""
        self._submitted_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Token | Exception] = asyncio.Queue()

    def start(self) -> None:
        """Note that the engine has begun to work on the request."""
        self._start = Start(queued_s=time.monotonic() - self._submitted_s, cached_tokens=0)

    def note_cached(self, tokens: int) -> None:
        """Note how many tokens of the prompt were in the cache; before the first token is posted."""
        if self._start is not None:
            self._start = replace(self._start, cached_tokens=tokens)

    def note_prompt(self, tokens: tuple[Token, ...]) -> None:
        """Note the prompt's tokens with their log probabilities; before the first token is posted."""
        if self._start is not None:
            self._start = replace(self._start, prompt=tokens)

    def post(self, item: Token | Exception) -> None:
        """Hand a token, the end or a failure to the reader; from any thread."""
        if isinstance(item, Token) and self._start is not None:
            item, self._start = replace(item, start=self._start), None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the reader with it
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    async def read(self, on_exit: Callable[[], None]) -> AsyncIterator[Token]:
        """Yield tokens until the end; raise what was posted as a failure. `on_exit` runs however it ends."""
        try:
            while True:
                item = await self._outbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.id is None:
                    return
        finally:
            on_exit()


class RequestQueue:
    """Takes requests, clients in turn; at most `max_waiting` wait while `max_running` are answered."""

    def __init__(
        self, *, max_running: int, max_waiting: int, adapters: Callable[[], tuple[str, ...]]
    ) -> None:
        """`adapters` returns those that the engine holds; it may be called from any thread."""
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._adapters = adapters
        self._waiting: FairQueue[RequestHandle] = FairQueue()
        self._running: list[RequestHandle] = []
        self._in_flight: Counter[str | None] = Counter()
        self._draining: set[str] = set()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._progress_s = time.monotonic()
        self._open = True
        self._changed = threading.Condition()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request` and return its answer; see `Engine.submit` for what is refused."""
        with self._changed:
            if not self._open:
                raise failures.stopped()
            if request.adapter is not None and request.adapter not in self.adapters():
                raise failures.not_loaded(request.adapter)
            if not self._has_place(request.client):
                raise failures.queue_full(self._max_waiting)
            handle = RequestHandle(request)
            self._in_flight[request.adapter] += 1
            self._waiting.append(request.client, handle)
            self._changed.notify_all()
        return handle.read(on_exit=lambda: self._drop(handle))

    def _has_place(self, client: str) -> bool:
        """Whether one more request of `client` may wait.

        A full queue takes one of a client that has none there while another has several, up to twice its
        size: one client's list of prompts is no reason to refuse the others.
        """
        places = self._max_waiting + self._max_running - len(self._running)
        waiting = len(self._waiting)
        return waiting < places or (self._waiting.is_unfair_to(client) and waiting < 2 * places)

    def take(self, *, wait: bool) -> list[RequestHandle]:
        """Run calls, then return the requests that may start now; with `wait`, not before there is one.

        Empty also when there were only calls to run, or the queue was closed.
        """
        self.wait(idle=wait)
        started = []
        while (handle := self.first()) is not None:
            if self.begin(handle):
                started.append(handle)
        return started

    def wait(self, *, idle: bool) -> None:
        """Run calls; an `idle` engine waits until there is something to do: a call, a request, the end."""
        with self._changed:
            if idle:
                self._changed.wait_for(self._has_work)
                self._progress_s = time.monotonic()
        self.run_calls()

    def first(self) -> RequestHandle | None:
        """Return the request that is next to start; None while none may."""
        with self._changed:
            may_start = self._open and self._waiting and len(self._running) < self._max_running
            return self._waiting.first() if may_start else None

    def begin(self, handle: RequestHandle) -> bool:
        """Count the request that `first` returned as running; False where it ended meanwhile."""
        with self._changed:
            if self._waiting.first() is not handle:
                return False
            self._running.append(self._waiting.pop())
            handle.start()
            return True

    def _has_work(self) -> bool:
        """Whether there is something to do: a call, a request that may start, or the end."""
        can_start = len(self._running) < self._max_running
        return bool(self._calls) or (bool(self._waiting) and can_start) or not self._open

    def call(self, work: Callable[[], None]) -> None:
        """Run `work` on the engine's thread between two steps, and wait; raises what `work` raises.

        Not in the caller's thread, because each thread that runs torch's parallel operators on a CPU keeps
        a pool of its own, and with more pools than cores OpenMP stops spinning: every step from then on
        takes twice as long (tests/bench/RESULTS.md).
        """
        done: Future[None] = Future()
        with self._changed:
            if not self._open:
                raise failures.stopped()
            self._calls.append((work, done))
            self._changed.notify_all()
        done.result()

    def run_calls(self) -> None:
        """Run what `call` has queued; on the engine's thread."""
        while True:
            with self._changed:
                if not self._calls:
                    return
                work, done = self._calls.popleft()
            try:
                done.set_result(work())
            except Exception as error:  # raised by `call`, in the caller's thread
                done.set_exception(error)

    def finish(self, handle: RequestHandle, end: End) -> None:
        """Give a running request its end or failure, and its slot to the next."""
        with self._changed:
            if handle in self._running:
                self._running.remove(handle)
                self._end(handle, end)

    def note_progress(self) -> None:
        """Note that a step was made."""
        self._progress_s = time.monotonic()

    def cancel(self, request_id: str) -> None:
        """Stop the request of that id, waiting or running."""
        with self._changed:
            for handle in (*self._waiting, *self._running):
                if handle.request.id == request_id:
                    self._drop(handle)

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that new requests may name."""
        return tuple(name for name in self._adapters() if name not in self._draining)

    def drain_adapter(self, name: str) -> None:
        """Refuse new requests for adapter `name` and wait until none is in flight."""
        with self._changed:
            if name not in self.adapters():
                raise failures.not_loaded(name)
            self._draining.add(name)
            self._changed.wait_for(lambda: not self._in_flight[name] or not self._open)

    def adapter_removed(self, name: str) -> None:
        """Note that a drained adapter is out of memory; its name may be used again."""
        self._draining.discard(name)

    def close(self, end: FinishReason | Exception) -> None:
        """Refuse new requests; waiting ones end now, running ones are marked for the thread's next step."""
        with self._changed:
            self._open = False
            while self._waiting:
                self._end(self._waiting.pop(), end)
            for handle in self._running:
                self._mark(handle)
            while self._calls:
                self._calls.popleft()[1].set_exception(failures.stopped())
            self._changed.notify_all()

    def abort(self, failure: Exception) -> None:
        """Close because the engine cannot go on, and end everything that runs with the same failure."""
        self.close(failure)
        for handle in tuple(self._running):
            self.finish(handle, failure)

    @property
    def is_open(self) -> bool:
        """False once closed or aborted."""
        return self._open

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that the engine has not begun."""
        return len(self._waiting)

    @property
    def last_progress_s(self) -> float:
        """time.monotonic() of the last step, or now when there is nothing to do."""
        idle = not self._running and not self._waiting
        return time.monotonic() if idle else self._progress_s

    def stats(self, *, kv_cache_share: float, alive: bool) -> Stats:
        """Return the queue's own figures with the two that every engine adds."""
        return Stats(
            running=self.running,
            waiting=self.waiting,
            kv_cache_share=kv_cache_share,
            last_progress_s=self.last_progress_s,
            alive=alive,
            adapters=self.adapters(),
            max_requests=self._max_running + self._max_waiting,
        )

    def _drop(self, handle: RequestHandle) -> None:
        """Cancel a request: a waiting one ends here, a running one at the next step."""
        with self._changed:
            self._mark(handle)
            if self._waiting.remove(handle.request.client, handle):
                self._end(handle, "cancelled")

    def _mark(self, handle: RequestHandle) -> None:
        """Note that a request is cancelled, and say so to the engine that runs it."""
        if not handle.cancelled:
            handle.cancelled = True
            handle.on_cancel()

    def _end(self, handle: RequestHandle, end: End) -> None:
        self._in_flight[handle.request.adapter] -= 1
        handle.post(Token(None, end) if isinstance(end, str) else end)
        self._changed.notify_all()
