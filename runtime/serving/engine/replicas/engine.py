"""The engine over several replicas of a model, each a process with an engine and a GPU of its own.

Requests wait here, in one queue, until a replica has a sequence to spare; so a 429 means that all are full. A
replica that ends by itself ends the engine, and with it the server, which is then restarted whole. Knows
messages and processes; does not know models or how tokens are made. Start at `start`, then `ReplicaEngine`.
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runtime import hardware
from runtime.errors import Failure
from runtime.hardware import Hardware
from runtime.serving.engine import failures
from runtime.serving.engine.protocol import Request, Stats, Token
from runtime.serving.engine.replicas.dispatch import Dispatcher, ReplicaLoad
from runtime.serving.engine.replicas.messages import (
    AdapterDone,
    CancelRequest,
    CloseReplica,
    LoadAdapter,
    ReplicaReady,
    ReplicaTask,
    StepOutput,
    SubmitRequest,
    UnloadAdapter,
)
from runtime.serving.engine.replicas.process import ReplicaProcess
from runtime.serving.engine.request_queue import LAST_STEP_S, End, RequestHandle, RequestQueue
from runtime.serving.settings import ServeConfig

log = logging.getLogger(__name__)


class Replica:
    """One process, what it runs, and what it said last."""

    def __init__(self, task: ReplicaTask, devices: Hardware) -> None:
        """Start it; `ready` is its ReplicaReady, or the failure that it ended with."""
        self.ready: Future[ReplicaReady] = Future()
        self.adapter_done: Future[None] = Future()
        """Of the last adapter message."""
        self.on_loss: Callable[[Failure], None] = lambda _: None
        self.on_step: Callable[[list[tuple[int, Token | Failure]]], None] = lambda _: None
        self.running: dict[int, RequestHandle] = {}
        self.busy_since_s = 0.0
        """time.monotonic() when the first of `running` was sent."""
        self.stats: Stats
        self._closing = False
        self.process = ReplicaProcess(
            f"replica {task.number} of {task.config.replicas}",
            hardware.environment_of(devices, task.number),
            on_message=self._take,
            on_end=self._ended,
        )
        self.process.send(task)

    def ask(self, message: LoadAdapter | UnloadAdapter) -> "Future[None]":
        """Send an adapter message; the future has its outcome, also where the process ends."""
        self.adapter_done = Future()
        if not self.process.alive:
            _settle(self.adapter_done, failures.died())
        self.process.send(message)
        return self.adapter_done

    def close(self) -> None:
        """Have it cancel what it runs and end."""
        self._closing = True
        self.process.send(CloseReplica())

    def kill(self) -> None:
        """End it at once."""
        self._closing = True
        self.process.kill()

    def _take(self, message: Any) -> None:
        match message:
            case StepOutput(items):
                self.on_step(items)
            case Stats():
                self.stats = message
            case AdapterDone(failure):
                _settle(self.adapter_done, failure)
            case ReplicaReady():
                self.stats = message.stats
                self.ready.set_result(message)
            case Failure():
                self.ready.set_exception(message)

    def _ended(self) -> None:
        failure = self.process.end()
        if not self.ready.done():
            self.ready.set_exception(type(failure)(f"{failure} while it loaded; its own line says why"))
        _settle(self.adapter_done, failures.died())
        if not self._closing:
            self.on_loss(failure)


def _settle(future: "Future[None]", failure: Failure | None) -> None:
    """Give `future` its outcome, unless it has one: two threads may notice that a process has ended."""
    with contextlib.suppress(InvalidStateError):
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)


def start(
    config: ServeConfig, devices: Hardware, *, max_waiting: int
) -> "tuple[ReplicaEngine, ReplicaReady]":
    """Return the engine over `config.replicas` processes, and what the first of them has loaded.

    The model has its `path`, and a process a queue as long as its rows. Raises what the first process that
    fails ended with; the others are then ended.
    """
    tasks = [ReplicaTask(number, config) for number in range(config.replicas)]
    replicas: list[Replica] = []
    try:
        replicas.extend(Replica(task, devices) for task in tasks)
        loading = [replica.ready for replica in replicas]
        for done in wait(loading, return_when=FIRST_EXCEPTION).done:
            done.result()
    except BaseException:
        for replica in replicas:
            replica.kill()
        for replica in replicas:
            replica.process.wait(LAST_STEP_S)
        raise
    return ReplicaEngine(replicas, max_waiting=max_waiting), loading[0].result()


class ReplicaEngine:
    """Answers as many requests as all replicas together; `max_waiting` more wait, in order of arrival."""

    def __init__(self, replicas: Sequence[Replica], *, max_waiting: int) -> None:
        """All of them are ready."""
        self.context_tokens = min(replica.ready.result().context_tokens for replica in replicas)
        self.max_sequences = sum(replica.stats.max_sequences for replica in replicas)
        self._replicas = replicas
        self._adapters: dict[str, None] = {}
        self._adapter_lock = threading.Lock()
        """Held while adapters change: one message at a time."""
        self._queue = RequestQueue(
            max_running=self.max_sequences, max_waiting=max_waiting, adapters=lambda: tuple(self._adapters)
        )
        self._dispatch_lock = threading.Lock()
        self._dispatcher = Dispatcher(
            [ReplicaLoad(replica.stats.max_sequences) for replica in replicas],
            cache_tokens=sum(replica.stats.cache_tokens for replica in replicas),
        )
        self._lost = False
        for number, replica in enumerate(replicas):
            replica.on_step = partial(self._post, number)
            replica.on_loss = self._replica_lost
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if not all(replica.process.alive for replica in replicas):  # before `on_loss` was set
            self.abort()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`."""
        return self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._queue.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Have every replica read an adapter, or none; see `Engine.add_adapter`."""
        with self._adapter_lock:
            if name in self._adapters:
                raise failures.already_loaded(name)
            asked = [
                replica.ask(LoadAdapter(name, folder.absolute(), strength)) for replica in self._replicas
            ]
            wait(asked)
            refused = [error for done in asked if (error := done.exception()) is not None]
            if refused:
                holders = zip(self._replicas, asked, strict=True)
                wait([each.ask(UnloadAdapter(name)) for each, done in holders if done.exception() is None])
                raise refused[0]
            self._adapters[name] = None

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter once no request uses it; see `Engine.remove_adapter`."""
        self._queue.drain_adapter(name)
        with self._adapter_lock:
            asked = [replica.ask(UnloadAdapter(name)) for replica in self._replicas]
            del self._adapters[name]
            self._queue.adapter_removed(name)
            for done in asked:
                done.result()

    def stats(self) -> Stats:
        """Return the sums of this moment; what replicas count is a tenth of a second old."""
        each = [replica.stats for replica in self._replicas]
        out_of_memory: Counter[str] = Counter()
        for stats in each:
            out_of_memory.update(stats.out_of_memory)
        limits = [stats.prompt_tokens_limit for stats in each if stats.prompt_tokens_limit]
        own = self._queue.stats(
            kv_cache_share=sum(stats.kv_cache_share for stats in each) / len(each),
            alive=self._thread.is_alive()
            and not self._lost
            and all(replica.process.alive for replica in self._replicas),
        )
        return replace(
            own,
            last_progress_s=self._last_progress_s(),
            prompt_tokens=sum(stats.prompt_tokens for stats in each),
            cached_tokens=sum(stats.cached_tokens for stats in each),
            drafted_tokens=sum(stats.drafted_tokens for stats in each),
            accepted_tokens=sum(stats.accepted_tokens for stats in each),
            preemptions=sum(stats.preemptions for stats in each),
            max_sequences=self.max_sequences,
            cache_tokens=sum(stats.cache_tokens for stats in each),
            out_of_memory=out_of_memory,
            prompt_tokens_limit=min(limits, default=0),
            replicas=len(each),
        )

    def close(self) -> None:
        """End what is in flight as cancelled, then the processes."""
        self._queue.close("cancelled")
        self._thread.join(LAST_STEP_S)
        for replica in self._replicas:
            replica.close()
        deadline = time.monotonic() + LAST_STEP_S
        for replica in self._replicas:
            replica.process.wait(max(0.0, deadline - time.monotonic()))
            for handle in tuple(replica.running.values()):
                self._queue.finish(handle, "cancelled")

    def abort(self) -> None:
        """Give up at once and end the processes; see `Engine.abort`."""
        self._lost = True
        self._queue.abort(failures.died())
        for replica in self._replicas:
            replica.kill()

    def _replica_lost(self, failure: Failure) -> None:
        log.error("%s: the server ends, so that all of it is started again", failure)
        self.abort()

    def _last_progress_s(self) -> float:
        """Return when the busy replica that is silent for longest made its last step; now if none is busy."""
        busy = [replica for replica in self._replicas if replica.running]
        last = [max(replica.stats.last_progress_s, replica.busy_since_s) for replica in busy]
        return min(last, default=time.monotonic())

    def _run(self) -> None:
        """Send each request to a replica as soon as one has a sequence to spare."""
        sent = 0
        while self._queue.is_open:
            for handle in self._queue.take(wait=True):
                sent += 1
                self._send(sent, handle)

    def _send(self, number: int, handle: RequestHandle) -> None:
        request, sampling = handle.request, handle.request.sampling
        with self._dispatch_lock:
            replica = self._replicas[self._dispatcher.choose(request)]
        if not replica.running:
            replica.busy_since_s = time.monotonic()
        replica.running[number] = handle
        # a replica with more memory would go on for longer than clients are told
        room = max(1, self.context_tokens - len(request.prompt_ids))
        sampling = replace(sampling, grammar=None, max_new_tokens=min(sampling.max_new_tokens, room))
        constraint = request.sampling.grammar.constraint if request.sampling.grammar else None
        replica.process.send(SubmitRequest(number, replace(request, sampling=sampling), constraint))
        handle.on_cancel = lambda: replica.process.send(CancelRequest(number))
        if handle.cancelled:  # while it was sent
            handle.on_cancel()

    def _post(self, number: int, items: list[tuple[int, Token | Failure]]) -> None:
        """Give requests the tokens that replica `number` has made in one step."""
        running = self._replicas[number].running
        for request, item in items:
            handle = running[request]
            end: End | None = item
            if isinstance(item, Token):
                self._post_token(handle, item)
                end = replace(item, start=None) if item.id is None else None
            if end is not None:
                del running[request]
                with self._dispatch_lock:
                    self._dispatcher.ended(number, handle.request)
                self._queue.finish(handle, end)

    @staticmethod
    def _post_token(handle: RequestHandle, token: Token) -> None:
        """Post `token` with the time in this queue, which is where requests wait; its end is not posted."""
        if token.start is not None:
            handle.note_cached(token.start.cached_tokens)
            handle.note_prompt(token.start.prompt)
        if token.id is not None:
            handle.post(replace(token, start=None) if token.start is not None else token)
