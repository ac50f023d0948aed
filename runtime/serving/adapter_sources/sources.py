"""A request's `model` that is not in memory becomes an adapter from a registry, while other requests go on.

    name → in memory → leased until the request is answered
         → remembered failure → refused
         → one load for all who ask: look-up, pull, check (threads) → room in memory → engine → leased

Lives in the event loop; what blocks runs in threads. Does not know HTTP. Start at `AdapterSources.lease`.
"""

import asyncio
import contextlib
import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runtime import oci
from runtime.errors import (
    CapacityError,
    ClientGoneError,
    ConfigError,
    Failure,
    OverloadedError,
    RegistryError,
    RequestError,
    TransientError,
    UnavailableError,
    UnknownModelError,
    one_line,
)
from runtime.metrics import ServingMetrics
from runtime.oci import AccessDeniedError, Reference
from runtime.serving.adapter_sources.disk import AdapterFiles
from runtime.serving.adapter_sources.images import AdapterImages
from runtime.serving.adapter_sources.remembered import RememberedFailures
from runtime.serving.adapter_sources.residents import Resident, Residents, key_of
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import ServeConfig
from runtime.serving.tokenizing import CALLER

log = logging.getLogger(__name__)

T = TypeVar("T")

Attach = Callable[[ServedModel, str, Path], None]
"""Checks the adapter in a folder and has the engine read it under a name; blocks."""

REMEMBERED_S, OUTAGE_S = 60.0, 5.0
"""How long a name that is unknown or refused is not asked for again, and one that could not be asked for."""
LONGEST_NAME = 255


@dataclass(slots=True, eq=False)
class _Load:
    """One load, and how many requests wait for it."""

    task: "asyncio.Task[Resident | Failure]"
    waiting: int = 0


class AdapterSources:
    """The adapters below `config.adapter_sources`, loaded as requests name them."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        attach: Attach,
        access: oci.Access,
        metrics: ServingMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ConfigError for a source that is none, or a cache that cannot be used."""
        self._sources = tuple(map(oci.parse_repository, config.adapter_sources))
        self._limits = limits = config.adapter_limits
        self._attach, self._metrics, self._clock = attach, metrics, clock
        self._files = AdapterFiles(
            config.adapter_cache,
            most_bytes=limits.cache_bytes,
            on_evicted=lambda: metrics.adapter_evicted("disk"),
        )
        self._images = AdapterImages(self._files, limits, access)
        self._residents = Residents()
        self._failures = RememberedFailures(clock)
        self._loads: dict[str, _Load] = {}
        self._refreshes: dict[str, asyncio.Task[None]] = {}
        self._waiting = 0
        self._pulling = asyncio.Semaphore(limits.pulls)
        self._memory = asyncio.Lock()
        """Held while what is in memory changes."""
        self._freed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # further threads for look-ups of tags, and for the engine
        self._threads = ThreadPoolExecutor(limits.pulls + 3, thread_name_prefix="adapters")

    def close(self) -> None:
        """Load nothing more; nothing waits for what is under way."""
        for task in (*(load.task for load in self._loads.values()), *self._refreshes.values(), *self._tasks):
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._files.close()

    def references(self, name: str) -> tuple[Reference, ...]:
        """Return what `name` may mean, by source; empty where it is no name of an adapter."""
        if len(name) > LONGEST_NAME:
            return ()
        return tuple(found for source in self._sources if (found := oci.below(source, name)) is not None)

    def loaded(self, name: str) -> bool:
        """Whether requests for `name` need no registry."""
        return self.key(name) is not None

    def key(self, name: str) -> str | None:
        """Return what the engine calls the adapter `name`, None where it is not in memory."""
        resident = self._residents.current(name)
        return None if resident is None else resident.key

    async def lease(self, served: ServedModel, name: str, *, param: str) -> str:
        """Return what the engine calls the adapter `name`; it stays until the caller's request is answered.

        Raises UnknownModelError for a name that no source has, RequestError for an adapter that must not be
        served, OverloadedError where too many requests wait, UnavailableError where the registry does not
        answer or no adapter can make room, ClientGoneError once the caller has left.
        """
        references = self.references(name)
        if not references:
            raise _unknown(name, param)
        resident = self._residents.use(name)
        if resident is not None:
            self._metrics.adapter_hit()
            resident.leases += 1
            self._refresh(served, resident)
        else:
            resident = await self._awaited(served, name, param)
        CALLER.get().held.callback(self._release, served, resident)
        return resident.key

    async def drop(self, served: ServedModel, name: str) -> bool:
        """Take no more requests for `name` and remove it once it is unused; whether it was in memory."""
        resident = self._residents.withdraw(name)
        if resident is not None:
            self._remove_if_unused(served, resident)
        return resident is not None

    async def _awaited(self, served: ServedModel, name: str, param: str) -> Resident:
        """Return the adapter `name`, leased, once it is loaded."""
        if (failure := self._failures.get(name)) is not None:
            raise _for_request(failure, param)
        if self._waiting >= self._limits.waiting:
            raise OverloadedError(f"{self._waiting} requests wait for adapters already; try again shortly")
        load = self._loads.get(name)
        if load is None:
            if len(self._loads) >= self._limits.waiting:  # those of clients that have left count too
                raise OverloadedError(f"{len(self._loads)} adapters are loaded already; try again shortly")
            load = self._loads[name] = _Load(asyncio.create_task(self._load(served, name)))
        load.waiting += 1
        self._waiting += 1
        outcome: Resident | Failure | None = None
        try:
            left = CALLER.get().left()
            await asyncio.wait(
                (load.task, left), timeout=self._limits.wait_s, return_when=asyncio.FIRST_COMPLETED
            )
            if load.task.done():
                outcome = load.task.result()
        finally:
            self._waiting -= 1
            if outcome is None:
                self._give_up(served, load)
        if isinstance(outcome, Resident):
            return outcome
        if outcome is not None:
            raise _for_request(outcome, param)
        if left.done():
            raise ClientGoneError("the client closed the connection")
        raise UnavailableError(f"adapter '{name}' is still being loaded; try again shortly")

    def _give_up(self, served: ServedModel, load: _Load) -> None:
        """Wait no longer for a load, which goes on for the others and for later ones."""
        load.waiting -= 1
        ended = load.task.done() and not load.task.cancelled()
        if ended and isinstance(outcome := load.task.result(), Resident):
            self._release(served, outcome)

    async def _load(self, served: ServedModel, name: str) -> Resident | Failure:
        """Load an adapter, leased for all who wait; return why not otherwise, and remember it."""
        started = self._clock()
        try:
            resident = await self._loaded(served, name)
        except Failure as failure:
            return self._failed(name, failure)
        except Exception as error:
            log.exception("Adapter %s: unexpected", name)
            return self._failed(name, UnavailableError(f"{type(error).__name__}: {one_line(error)}"))
        else:
            resident.leases += self._loads[name].waiting
            self._release(served, resident)
            self._metrics.adapter_loaded(self._clock() - started)
            log.info("Adapter loaded: %s (%s)", name, resident.digest)
            return resident
        finally:
            del self._loads[name]

    async def _loaded(self, served: ServedModel, name: str) -> Resident:
        """Look `name` up, pull it and have the engine read it, beside what the name stood for before.

        The adapter is leased once, for whoever calls this.
        """
        async with self._pulling:
            image = await self._in_thread(lambda: self._images.find(self.references(name)))
            key = key_of(name, image.digest)
            pulled = self._images.pulled(image)
            folder = await self._in_thread(pulled.__enter__)
            try:
                async with self._memory:
                    resident = self._residents.find(key)  # a tag that has moved and moved back
                    if resident is None:
                        await self._read(served, key, folder)
                        resident = Resident(name, image.reference, image.digest, self._clock())
                    resident.leases += 1  # before the next load looks for one that is unused
                    self._residents.put(resident)
            finally:
                with contextlib.suppress(RuntimeError):  # the server ends
                    self._threads.submit(pulled.__exit__, None, None, None)
        resident.checked_at = self._clock()
        for each in tuple(self._residents):
            if not self._residents.is_current(each):
                self._remove_if_unused(served, each)
        return resident

    async def _read(self, served: ServedModel, key: str, folder: Path) -> None:
        """Have the engine read an adapter; unused ones make room for it, the least recently used first."""
        while len(self._residents) >= self._limits.resident:
            await self._evict(served)
        while True:
            try:
                await self._in_thread(lambda: self._attach(served, key, folder))
            except CapacityError:
                if self._residents.unused() is None:
                    raise
                await self._evict(served)
            except ConfigError as error:
                raise ConfigError(_without(str(error), key, folder)) from None
            else:
                return

    async def _evict(self, served: ServedModel) -> None:
        """Remove the least recently used adapter that nobody uses, once there is one."""
        try:
            async with asyncio.timeout(self._limits.wait_s):
                while (unused := self._residents.unused()) is None:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise UnavailableError(
                f"all {len(self._residents)} adapters in memory are in use; try again shortly"
            ) from None
        await self._remove(served, unused)
        self._metrics.adapter_evicted("memory")

    async def _remove(self, served: ServedModel, resident: Resident) -> None:
        """Have the engine forget an adapter that no request uses."""
        self._residents.remove(resident)
        await self._in_thread(lambda: served.remove_adapter(resident.key))
        log.info("Adapter removed from memory: %s (%s)", resident.name, resident.digest)

    def _release(self, served: ServedModel, resident: Resident) -> None:
        resident.leases -= 1
        if not resident.leases:
            self._freed.set()
            self._remove_if_unused(served, resident)

    def _remove_if_unused(self, served: ServedModel, resident: Resident) -> None:
        """Remove an adapter that its name stands for no longer, in a task of its own."""

        async def remove() -> None:
            async with self._memory:
                stands = self._residents.find(resident.key) is not resident
                if not stands and not resident.leases and not self._residents.is_current(resident):
                    await self._remove(served, resident)

        if not resident.leases and not self._residents.is_current(resident):
            task = asyncio.create_task(remove())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _refresh(self, served: ServedModel, resident: Resident) -> None:
        """Look a tag up again, beside the requests, where it was looked up long ago."""
        age = self._clock() - resident.checked_at
        if age < self._limits.refresh_s or resident.name in self._refreshes:
            return
        resident.checked_at = self._clock()
        task = asyncio.create_task(self._follow(served, resident))
        self._refreshes[resident.name] = task
        task.add_done_callback(lambda _: self._refreshes.pop(resident.name, None))

    async def _follow(self, served: ServedModel, resident: Resident) -> None:
        """Load what the tag names now, where that is another image; requests get the old one until then."""
        name = resident.name
        try:
            digest = await self._in_thread(lambda: self._images.digest(resident.reference))
            if digest is None:
                log.warning("Adapter %s: its tag is gone from the registry; it is served no more", name)
                self._residents.withdraw(name)
                self._remove_if_unused(served, resident)
            elif digest != resident.digest and name not in self._loads:
                self._release(served, await self._loaded(served, name))
                log.info("Adapter %s: its tag has moved to %s", name, digest)
        except Failure as failure:
            self._metrics.adapter_failed(failure_reason(failure))
            log.warning("Adapter %s: its tag cannot be followed, the one in memory stays: %s", name, failure)
        except Exception:
            log.exception("Adapter %s: its tag cannot be followed, the one in memory stays", name)

    def _failed(self, name: str, failure: Failure) -> Failure:
        """Log and count why an adapter is not served; return, and remember, what requests are told."""
        reason = failure_reason(failure)
        self._metrics.adapter_failed(reason)
        log.warning("Adapter refused: %s: %s", name, failure)
        told = _told(name, failure)
        passing = isinstance(told, UnavailableError)
        self._failures.put(name, told, seconds=OUTAGE_S if passing else REMEMBERED_S)
        return told

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _unknown(name: str, param: str | None = None, more: str = "") -> UnknownModelError:
    shown = one_line(name, 100)
    return UnknownModelError(
        f"model '{shown}' is not served here, and no adapter source has it{more}; GET /v1/models lists those "
        "in memory",
        param=param,
        code="model_not_found",
    )


def _told(name: str, failure: Failure) -> Failure:
    """Return what clients are told: nothing of registries and paths."""
    if isinstance(failure, AccessDeniedError):
        return _unknown(name, more=", or this server may not read it")
    if isinstance(failure, UnknownModelError):
        return _unknown(name)
    if isinstance(failure, ConfigError):
        return RequestError(f"adapter '{name}' cannot be served: {failure}", code="adapter_refused")
    if isinstance(failure, RegistryError):
        return RegistryError(f"adapter '{name}' cannot be pulled; the server's log says why")
    if isinstance(failure, TransientError):
        return UnavailableError(f"adapter '{name}': its registry does not answer; try again shortly")
    if isinstance(failure, CapacityError):
        return UnavailableError(f"adapter '{name}': there is no room for it; try again shortly")
    return failure if isinstance(failure, RequestError) else UnavailableError(f"adapter '{name}': {failure}")


_REASONS: tuple[tuple[type[Failure], str], ...] = (
    (UnknownModelError, "unknown"),
    (AccessDeniedError, "denied"),
    (ConfigError, "refused"),
    (RegistryError, "registry"),
    (TransientError, "unreachable"),
    (Failure, "no_room"),
)
"""Kinds of failure as the metric names them; the first that fits."""


def failure_reason(failure: Failure) -> str:
    """Return what the metric of failures calls why an adapter was not loaded."""
    return next(reason for kind, reason in _REASONS if isinstance(failure, kind))


def _for_request(failure: Failure, param: str) -> Failure:
    """Return `failure` for one more request, whose field `param` names the adapter."""
    own = copy.copy(failure)
    own.__traceback__ = own.__cause__ = own.__context__ = None
    if isinstance(own, RequestError) and not isinstance(own, UnavailableError):
        own.param = param
    return own


def _without(message: str, key: str, folder: Path) -> str:
    """Return what is wrong with an adapter, without the server's name for it and the path of its files."""
    return (
        message.removeprefix(f"adapter {key}: ").replace(f"{folder}/", "").replace(str(folder), "the image")
    )
