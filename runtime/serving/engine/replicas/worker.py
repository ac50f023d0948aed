"""The inside of a replica's process: the server's messages become calls of an engine, tokens become messages.

Tokens of one step leave together, in one message. Does not know how the engine came about
(runtime/serving/replica.py makes it). Start at `ReplicaWorker.run`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from runtime.errors import Failure, UnavailableError
from runtime.serving.engine import failures
from runtime.serving.engine.protocol import Constraint, Engine, Grammar, Request, Sampling, Token
from runtime.serving.engine.replicas.messages import (
    AdapterDone,
    CancelRequest,
    CloseReplica,
    LoadAdapter,
    StepOutput,
    SubmitRequest,
    UnloadAdapter,
)

log = logging.getLogger(__name__)

STATS_S = 0.1
"""How often figures are sent, where they have changed."""
LAST_ENDS_S = 1.0
"""For the ends of cancelled answers to be read after the engine has closed."""


class ReplicaWorker:
    """Runs in one event loop, in which all messages are sent and `take` is called."""

    def __init__(
        self,
        engine: Engine,
        *,
        send: Callable[[object], None],
        compile_grammar: Callable[[Constraint], Awaitable[Grammar]],
    ) -> None:
        self._engine = engine
        self._send = send
        self._compile = compile_grammar
        self._running: dict[int, asyncio.Task[None]] = {}
        self._step: list[tuple[int, Token | Failure]] = []
        self._closing = asyncio.Event()
        # one thread: messages are carried out in order
        self._adapters = ThreadPoolExecutor(1, thread_name_prefix="adapter")
        self._changes: set[asyncio.Future[None]] = set()

    async def first_token(self) -> None:
        """Generate one token, which proves that the engine works; raises what it fails with."""
        async for token in self._engine.submit(Request((0,), Sampling(max_new_tokens=1), id="warm-up")):
            if token.finish_reason == "cancelled":
                raise UnavailableError("the engine did not complete its first generation")

    async def run(self) -> int:
        """Send figures until the server closes this replica or the engine dies; return the exit status."""
        sent = None
        while not self._closing.is_set():
            stats = self._engine.stats()
            if not stats.alive:
                log.critical("The engine of this replica has died")
                return 1
            idle = not stats.running and not stats.waiting
            shown = replace(stats, last_progress_s=0.0 if idle else stats.last_progress_s)
            if shown != sent:
                self._send(replace(stats, out_of_memory=dict(stats.out_of_memory)))
                sent = shown
            try:
                async with asyncio.timeout(STATS_S):
                    await self._closing.wait()
            except TimeoutError:
                continue
        await asyncio.to_thread(self._engine.close)
        if self._running:
            await asyncio.wait(tuple(self._running.values()), timeout=LAST_ENDS_S)
        self._flush()
        return 0

    def take(self, message: Any) -> None:
        """Carry out one message of the server."""
        match message:
            case SubmitRequest(number, request, constraint):
                self._running[number] = asyncio.create_task(self._answer(number, request, constraint))
            case CancelRequest(number):
                if number in self._running:
                    task = self._running[number]
                    self._put(number, Token(None, "cancelled"))
                    task.cancel()
            case LoadAdapter(name, folder, strength):
                self._change(lambda: self._engine.add_adapter(name, folder, strength=strength))
            case UnloadAdapter(name):
                self._change(lambda: self._engine.remove_adapter(name))
            case CloseReplica():
                self._closing.set()

    async def _answer(self, number: int, request: Request, constraint: Constraint | None) -> None:
        try:
            if constraint is not None:
                grammar = await self._compile(constraint)
                request = replace(request, sampling=replace(request.sampling, grammar=grammar))
            async for token in self._engine.submit(request):
                self._put(number, token)
        except Exception as error:  # answers the request; the others go on
            self._put(number, failures.of(error))

    def _put(self, number: int, item: Token | Failure) -> None:
        """Send `item` with all others of this step; nothing of a request that has its end."""
        if number not in self._running:
            return
        if isinstance(item, Failure) or item.id is None:
            del self._running[number]
        if not self._step:
            asyncio.get_running_loop().call_soon(self._flush)
        self._step.append((number, item))

    def _flush(self) -> None:
        if self._step:
            items, self._step = self._step, []
            self._send(StepOutput(items))

    def _change(self, work: Callable[[], None]) -> None:
        """Add or remove an adapter in a thread, and say how it went."""

        async def change() -> None:
            failure = None
            try:
                await asyncio.get_running_loop().run_in_executor(self._adapters, work)
            except Exception as error:  # raised where the adapter was requested
                failure = failures.of(error)
            self._send(AdapterDone(failure))

        task = asyncio.ensure_future(change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
