"""Threads that tokenize: one for short texts, one for long ones; clients take turns in each.

The work is pure computation that releases the GIL for most of its time. A short text waits for short texts
only, each of which takes at most some 30 ms; of several clients with long texts each waits for one text of
every other. A third thread is for chat templates that were ended by their limits. Work of a client that has
left is not begun, and asked to stop. The threads are daemons: nothing waits for them at the end. Does not
know tokenizers or HTTP. Start at `TokenizingPool.run`.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from runtime.errors import ClientGoneError, UnavailableError
from runtime.serving.rate_limits import Budget

T = TypeVar("T")

SHORT_CHARACTERS = 16_384
"""Texts up to this length have a thread of their own."""


@dataclass(frozen=True, slots=True)
class Caller:
    """For whom work is done: one side of the round robin, and how it is known that it has left."""

    name: str = ""
    left: Callable[[], "asyncio.Future[None]"] = asyncio.Future
    """Returns what is done once the client has left."""
    budget: Budget | None = None
    """What it may use, where it has a key with limits."""
    held: ExitStack = field(default_factory=ExitStack)
    """Closed once its request is answered."""


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - never changed
"""Set where a request is received."""


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Callable[["Stopped"], T]
    loop: asyncio.AbstractEventLoop
    result: "asyncio.Future[T]"
    dropped: bool = False


Stopped = Callable[[], bool]
"""Says whether nobody waits for the result any more."""


@dataclass(slots=True)
class _Lane:
    """The jobs of one thread, by client; the first client is the next."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    jobs: "OrderedDict[str, deque[_Job[Any]]]" = field(default_factory=OrderedDict)
    closed: bool = False

    def put(self, name: str, job: "_Job[Any]") -> None:
        with self.changed:
            if self.closed:
                raise UnavailableError("the server is shutting down")
            self.jobs.setdefault(name, deque()).append(job)
            self.changed.notify()

    def take(self) -> "_Job[Any] | None":
        """Wait for the next job and return it; None once the lane is closed."""
        with self.changed:
            while not self.jobs and not self.closed:
                self.changed.wait()
            if self.closed:
                return None
            name, jobs = self.jobs.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self.jobs[name] = jobs  # behind all others
            return job

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.jobs.clear()
            self.changed.notify_all()


class TokenizingPool:
    """Runs work on texts outside the event loop."""

    def __init__(self) -> None:
        self._short, self._long, self._apart = _Lane(), _Lane(), _Lane()
        for name, lane in (("short", self._short), ("long", self._long), ("apart", self._apart)):
            threading.Thread(target=_work, args=(lane,), name=f"tokenize-{name}", daemon=True).start()

    async def run(self, work: Callable[[Stopped], T], *, characters: int, apart: bool = False) -> T:
        """Return what `work` returns, in this client's turn; `characters` is the length of its text.

        Work that may take a second whatever its length is done `apart`.

        Raises ClientGoneError as soon as the client has left; `work` may then ask, and end early.
        """
        caller, loop = CALLER.get(), asyncio.get_running_loop()
        left = caller.left()
        if left.done():
            raise ClientGoneError("the client closed the connection")
        result: asyncio.Future[T] = loop.create_future()
        job = _Job(work, loop, result)
        lane = self._short if characters <= SHORT_CHARACTERS else self._long
        lane = self._apart if apart else lane
        lane.put(caller.name, job)
        try:
            await asyncio.wait((result, left), return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientGoneError("the client closed the connection")
            return result.result()
        finally:
            job.dropped = True

    def close(self) -> None:
        """Drop what waits; the threads end after what they do now, and nothing waits for them."""
        self._short.close()
        self._long.close()
        self._apart.close()


def _work(lane: _Lane) -> None:
    while (job := lane.take()) is not None:
        if job.dropped:
            continue
        outcome: Any = None
        failure: BaseException | None = None
        try:
            outcome = job.work(lambda job=job: job.dropped)  # type: ignore[misc]
        except BaseException as error:  # raised again where it is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended: nothing waits
            job.loop.call_soon_threadsafe(_hand_over, job.result, outcome, failure)
        del job, outcome, failure


def _hand_over(result: "asyncio.Future[Any]", outcome: Any, failure: BaseException | None) -> None:
    if result.done():
        return
    if failure is None:
        result.set_result(outcome)
    else:
        result.set_exception(failure)
        result.exception()  # seen, whether or not somebody still waits
