"""The state of the server, and what the probes answer in it.

    loading → ready → draining

Knows the engine by its statistics only; does not know HTTP, signals or how a model is loaded
(http/server.py drives it). Start at `Lifecycle`.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from runtime.errors import OverloadedError, UnavailableError
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.engine.protocol import Engine, Request, Sampling
from runtime.serving.tokenizer import PromptTokenizer
from runtime.weights_digest import PendingDigest

STALL_S = 60.0
"""Requests running and no token for this long: the engine hangs and must be restarted."""

DIGEST_MARK = "@"
"""Between the name and the digest of an adapter from a registry, as the engine calls it; no name has one."""

STOPPING = "the server is shutting down; send the request to another replica"


class Phase(Enum):
    """One state of the server."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The loaded model: what all routes answer with."""

    name: str
    """The base model, as clients call it."""
    engine: Engine
    tokenizer: PromptTokenizer
    created: int
    """Unix time of loading, for /v1/models."""
    adapter_tokenizers: dict[str, PromptTokenizer] = field(default_factory=dict)
    """By name of the adapters that have a chat template of their own."""
    refused_adapters: list[str] = field(default_factory=list)
    """Configured adapters that are not served; the log says why."""
    default_adapter: str | None = None
    """The adapter that answers requests for the base model; None is the base model itself."""
    aliases: tuple[str, ...] = ()
    """Further names of the base model."""
    tool_call_parser: str | None = None
    """vLLM's name of the format of function calls; None is the one that the chat template writes."""
    reasoning_parser: str | None = None
    """vLLM's name of the format of reasoning; None is the one that the chat template opens or writes."""
    weights: str = ""
    """Type, size and device of the base weights, as text."""
    digest: PendingDigest | None = None
    """Of the base weights."""
    adapter_digests: dict[str, str | None] = field(default_factory=dict)
    """Of the adapters' weights, by what the engine calls them."""

    def tokenizer_for(self, adapter: str | None) -> PromptTokenizer:
        """Return what makes prompts for `adapter`: with its own chat template, where it has one."""
        return self.adapter_tokenizers.get(adapter or "", self.tokenizer)

    def remove_adapter(self, adapter: str) -> None:
        """Have the engine forget `adapter`, and what is kept of it here."""
        self.engine.remove_adapter(adapter)
        self.adapter_tokenizers.pop(adapter, None)
        self.adapter_digests.pop(adapter, None)

    def form_for(self, adapter: str | None) -> AnswerForm:
        """Return how the answers of `adapter` are read: its own chat template says it, where it has one."""
        tokenizer = self.tokenizer_for(adapter)
        return tokenizer.answer_form(reasoning=self.reasoning_parser, calls=self.tool_call_parser)

    async def first_token(self) -> None:
        """Generate one token, which proves that the engine works; UnavailableError when it does not."""
        sampling = Sampling(max_new_tokens=1)
        prompt_ids = self.tokenizer.warm_up_prompt()
        request = Request(prompt_ids, sampling, adapter=self.default_adapter, id="warm-up")
        async for token in self.engine.submit(request):
            if token.finish_reason == "cancelled":
                raise UnavailableError("the engine did not complete its first generation")

    def models(self) -> tuple[str, ...]:
        """Return the names a request may ask for: the base, then the adapters."""
        adapters = map(adapter_name, self.engine.stats().adapters)
        return tuple(dict.fromkeys((self.name, *self.aliases, *adapters)))

    def model_name(self, adapter: str | None) -> str:
        """Return what clients call `adapter`, or the base model."""
        return self.name if adapter is None else adapter_name(adapter)


def adapter_name(adapter: str) -> str:
    """Return what clients call an adapter of the engine's."""
    return adapter.partition(DIGEST_MARK)[0]


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
        """Answer requests with `served` and report "ready", unless the server is draining already."""
        self._served = served
        if served.digest is not None:  # reads all weights once more: not while they are loaded
            served.digest.start()
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def drain(self) -> None:
        """Report "not ready" from now on; requests are still answered until `refuse`."""
        self.phase = Phase.DRAINING

    def refuse(self) -> None:
        """Answer new requests 503 from now on; those in flight go on."""
        self.accepting = False

    @property
    def loaded(self) -> ServedModel | None:
        """What is served, or None before it is loaded; for metrics, not for requests."""
        return self._served

    def served(self) -> ServedModel:
        """Return what answers requests; UnavailableError before it is loaded."""
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
        """Check that a request may be accepted: before its body is read, so that a burst costs no bodies.

        Raises OverloadedError when as many are in flight as can be generated and queued, UnavailableError
        when none is accepted any more.
        """
        if not self.accepting:
            raise UnavailableError(STOPPING)
        if self._in_flight >= self._capacity:
            raise OverloadedError(f"{self._in_flight} requests are running or waiting; try again shortly")

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count one request as in flight while the block runs; raises as `admit` does."""
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
        """Wait until no request is in flight."""
        await self._idle.wait()
