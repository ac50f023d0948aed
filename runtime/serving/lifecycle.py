"""Where the server is in its life, and what the probes may say about it.

    loading → ready → draining

Knows the engine by its figures only; does not know HTTP, signals or how a model is loaded
(server.py drives it). Start at `Lifecycle`.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from runtime.errors import OverloadedError, UnavailableError
from runtime.serving.engine.protocol import Engine, Request, Sampling
from runtime.serving.tokenizer import PromptTokenizer

STALL_S = 60.0
"""Requests running and no token for this long: the engine hangs, and a restart is the cure."""


class Phase(Enum):
    """One state of the server."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What there is to answer with, once it is loaded."""

    name: str
    """The base model, as clients call it."""
    engine: Engine
    prompts: PromptTokenizer
    created: int
    """Unix time of loading, for /v1/models."""
    default: str | None = None
    """The adapter that answers for the base model's name; None is the base itself."""

    weights: str = ""
    """Type, size and device of the base weights, for people."""

    async def first_token(self) -> None:
        """Generate one token, which proves that the engine works; UnavailableError when it gives up."""
        sampling = Sampling(max_new_tokens=1)
        request = Request(self.prompts.warm_up(), sampling, adapter=self.default, id="warm-up")
        async for token in self.engine.submit(request):
            if token.finish_reason == "cancelled":
                raise UnavailableError("the engine gave up its first generation")

    def models(self) -> tuple[str, ...]:
        """Return the names a request may ask for: the base, then the adapters."""
        return (self.name, *self.engine.stats().adapters)


class Lifecycle:
    """The server's state, and the requests in flight that a drain waits for."""

    def __init__(
        self,
        *,
        capacity: int = sys.maxsize,
        clock: Callable[[], float] = time.monotonic,
        stall_s: float = STALL_S,
    ) -> None:
        self.phase = Phase.LOADING
        self.accepting = True
        self._served: ServedModel | None = None
        self._capacity = capacity
        self._clock = clock
        self._stall_s = stall_s
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self, served: ServedModel) -> None:
        """Open the doors, unless the process was asked to stop while it loaded."""
        self._served = served
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def drain(self) -> None:
        """Say "not ready" from now on; requests are still answered until `refuse`."""
        self.phase = Phase.DRAINING

    def refuse(self) -> None:
        """Answer new requests 503 from now on; those in flight go on."""
        self.accepting = False

    @property
    def loaded(self) -> ServedModel | None:
        """What is served, or None before it is loaded; for figures, not for requests."""
        return self._served

    def served(self) -> ServedModel:
        """Return what answers requests; UnavailableError while there is nothing yet."""
        if self._served is None:
            raise UnavailableError("the model is still loading; /readyz answers 200 when it is there")
        return self._served

    def liveness(self) -> str | None:
        """Return why the process should be restarted, or None.

        Judged by forward progress, never by a generation of its own: a busy engine is alive, and one
        that runs requests without giving a token is not.
        """
        if self._served is None:
            return None
        stats = self._served.engine.stats()
        if not stats.alive:
            return "the engine thread has died"
        silent_s = self._clock() - stats.last_progress_s
        if stats.running and silent_s > self._stall_s:
            return f"{stats.running} requests running and no token for {silent_s:.0f} s"
        return None

    def readiness(self) -> str | None:
        """Return why no request should be sent here, or None."""
        if self.phase is not Phase.READY:
            return str(self.phase.value)
        return self.liveness()

    def admit(self) -> None:
        """Check that a request may come in; asked before its body is read, so that a flood costs no bodies.

        Raises OverloadedError when as many are under way as can be generated and wait, UnavailableError
        when none is taken any more.
        """
        if not self.accepting:
            raise UnavailableError("the server is shutting down; send the request to another replica")
        if self._in_flight >= self._capacity:
            raise OverloadedError(f"{self._in_flight} requests are running or waiting; try again shortly")

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Hold a place for one request while the block runs; raises as `admit` does."""
        self.admit()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._idle.wait()
