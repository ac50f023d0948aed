"""Runs the server: port, loading, signals, drain. `run` returns when it has ended in order.

uvicorn speaks HTTP and does not handle signals: its own handling closes the listener at once, so that no
probe ever sees "not ready", and waits for streams for ever. Does not know routes. Start at `run`.
"""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sized
from functools import partial
from typing import cast

import uvicorn

from runtime import files, garbage_collection, hardware, torch_build
from runtime.errors import ConfigError, Failure
from runtime.metrics import ServingMetrics
from runtime.oci import Access, read_keys
from runtime.serving.adapter_sources.sources import AdapterSources
from runtime.serving.engine.protocol import Stats
from runtime.serving.http.acceptor import Acceptor, OpenConnections, connection_limit
from runtime.serving.http.admin import AdapterLoader
from runtime.serving.http.app import LaterAdapters, create_app
from runtime.serving.http.connections import Connection, Shared
from runtime.serving.http.origins import EVERY, Callers, known_hosts
from runtime.serving.http.write_watch import limit_unsent
from runtime.serving.keys import KeyFile, KeyRing
from runtime.serving.lifecycle import Lifecycle, ServedModel
from runtime.serving.settings import Limits, ServeConfig
from runtime.serving.settings import check as check_settings

log = logging.getLogger(__name__)

Load = Callable[[ServeConfig], ServedModel]

WATCH_S = 1.0
"""How often the engine is checked for being alive."""
WAITING_CONNECTIONS = 2048
CLOSE_TIMEOUT_S = 5
"""For the engine and connections to close after the last answer was cut off."""
LAST_READ_S = 2.0
"""Of that, for clients to read the ends of their answers; whose connection is open then is cut off."""
LAST_TASKS_S = 1.0
"""For what was done for them to end."""


def run(config: ServeConfig, *, access: Access | None = None, load: Load | None = None) -> None:
    """Serve until SIGTERM or SIGINT; return once everything in flight is answered or cancelled.

    `access` holds the credentials for adapters in registries. Raises ConfigError when the port cannot be
    bound or the GPU cannot be used, and the Failure that loading ended with.
    """
    check_settings(config)
    check_machine(config)
    hardware.limit_kernel_caches()
    with garbage_collection.paused():
        from runtime.serving import loading  # imports torch: only when a model is served

    access = required_access(config, access or Access())
    adapter_loader = None
    if config.adapter_root is not None:
        add = partial(loading.add_adapter, config=config, access=access)
        adapter_loader = AdapterLoader(config.adapter_root, add)
    sources = None
    if config.adapter_sources:
        attach = partial(loading.attach, config=config)
        sources = partial(AdapterSources, config, attach=attach, access=access)
    keys = key_file(config)
    with bind(config.host, config.port) as listener:
        load = load or partial(loading.load, access=access)
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            serving = Serving(config, load, adapter_loader, keys=keys, sources=sources)
            runner.run(serving.run(listener))


def required_access(config: ServeConfig, access: Access) -> Access:
    """Return `access` with the signatures that `config` requires; ConfigError for a key that is none."""
    access = access.requiring(config.model.required_keys)
    read_keys(access.required_keys)
    return access


def key_file(config: ServeConfig) -> KeyFile | None:
    """Return the file of keys, read; ConfigError where it is wrong."""
    if config.api_key_file is None:
        return None
    return KeyFile(config.api_key_file, single=_api_key(config))


def _api_key(config: ServeConfig) -> str | None:
    return config.api_key.get_secret_value() if config.api_key is not None else None


def check_machine(config: ServeConfig) -> None:
    """Raise ConfigError where this machine cannot serve `config`: its GPUs, its temporary directory."""
    files.check_temporary()
    if config.engine == "vllm":  # with a torch of its own
        hardware.detect()
    else:
        machine = torch_build.usable_hardware(quantized=config.quantization is not None)
        hardware.check_processes(machine, config.processes if config.parallel == "tp" else config.replicas)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; ConfigError says what to do when the port cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name, or asyncio does not take it for TCP and leaves Nagle's algorithm on: with a
    # client's delayed acknowledgement every second write of a reply or a stream would wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    limit_unsent(listener)
    try:
        listener.bind((host, port))
        listener.listen(WAITING_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(_why_unbound(error, host, port)) from None
    listener.setblocking(False)
    return listener


def url(address: str, port: int) -> str:
    """Return the URL under which a browser on this machine, or behind a port-forward, finds a listener."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    name = "localhost" if parsed.is_unspecified else f"[{parsed}]" if parsed.version == 6 else str(parsed)
    return f"http://{name}" + (f":{port}" if port != 80 else "")


def _why_unbound(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is in use on {host}: stop what listens there, or take another with --port or PORT"
        )
    if error.errno == errno.EACCES:
        return (
            f"may not bind port {port} as this user: use --port or PORT with 1024 or above, grant "
            "NET_BIND_SERVICE, or set the sysctl net.ipv4.ip_unprivileged_port_start=0"
        )
    return f"cannot listen on {host} port {port}: {error.strerror or error}"


class Serving:
    """One run of the server, from the open port to the last answer."""

    def __init__(
        self,
        config: ServeConfig,
        load: Load,
        adapter_loader: AdapterLoader | None = None,
        *,
        keys: KeyFile | None = None,
        sources: Callable[..., AdapterSources] | None = None,
    ) -> None:
        """`sources` makes, given `metrics`, what loads the adapters that requests name."""
        self._config = config
        self._make_sources = sources
        self._sources: AdapterSources | None = None
        self._key_file = keys
        single = _api_key(config)
        self._keys = keys.ring if keys is not None else KeyRing(single) if single is not None else None
        self._adapter_loader = adapter_loader
        self._load = load
        self._lifecycle = Lifecycle(capacity=config.replicas * (config.limits.rows + config.limits.queue))
        self._stop = asyncio.Event()
        self._closing = "requests"
        """What is being ended, for the log line where it does not end."""

    async def run(self, listener: socket.socket) -> None:
        """Answer on `listener` until a signal; raises what loading failed with."""
        self._url = url(*listener.getsockname()[:2])
        server = self._http_server(listener)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(server.serve())
        log.info("Listening on %s port %s", *listener.getsockname()[:2])
        loading: asyncio.Future[ServedModel] = loop.create_future()
        # A daemon: a process that has to stop while it loads need not wait for the weights.
        threading.Thread(target=self._load_into, args=(loop, loading), name="load", daemon=True).start()
        stop = asyncio.create_task(self._stop.wait())
        watching = self._watch_keys(loop)
        try:
            await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                await self._begin_serving(loading.result())
                await self._until_stopped()
            await self._drain()
        finally:
            self._lifecycle.refuse()
            if self._sources is not None:
                self._sources.close()
            if (served := self._lifecycle.loaded) is not None:
                self._closing = "a step of the engine"
                served.engine.close()
                self._closing = "the tokenizer"
                served.tokenizer.close()
            stop.cancel()
            if watching is not None:
                watching.cancel()
            self._closing = "connections"
            server.should_exit = True
            await serving
            self._closing = "threads"
        log.info("Stopped")

    def _watch_keys(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Task[None] | None":
        """Have the file of keys read again on SIGHUP, and when it has changed."""
        if self._key_file is None:
            return None
        loop.add_signal_handler(signal.SIGHUP, self._key_file.asked.set)
        return asyncio.create_task(self._key_file.watch())

    def _callers(self, address: str) -> Callers:
        """Return who may call the server that listens on `address`."""
        config = self._config
        if EVERY in config.allowed_origins:
            log.warning("Pages of every site may call this server: an allowed origin is *")
        return Callers(
            self._keys,
            frozenset(config.allowed_origins),
            known_hosts(config.host, address, config.allowed_hosts),
        )

    def _http_server(self, listener: socket.socket) -> uvicorn.Server:
        config = self._config
        key_figures = self._keys.figures if self._keys is not None else dict
        metrics = self._metrics = ServingMetrics(config.served_name, self._engine_stats, key_figures)
        if self._make_sources is not None:
            self._sources = self._make_sources(metrics=metrics)
        app = create_app(
            lifecycle=self._lifecycle,
            metrics=metrics,
            limits=config.limits,
            callers=self._callers(listener.getsockname()[0]),
            adapters=LaterAdapters(self._adapter_loader, self._sources),
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        uvicorn_config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            proxy_headers=False,
        )
        return _Server(uvicorn_config, listener, config.limits, metrics)

    def _engine_stats(self) -> Stats | None:
        served = self._lifecycle.loaded
        return served.engine.stats() if served is not None else None

    def _load_into(self, loop: asyncio.AbstractEventLoop, loading: "asyncio.Future[ServedModel]") -> None:
        """Load in this thread and hand the model or the failure to the event loop."""
        outcome: ServedModel | BaseException
        try:
            with garbage_collection.paused():
                outcome = self._load(self._config)
        except BaseException as failure:  # raised again where it is awaited
            outcome = failure
        with contextlib.suppress(RuntimeError):  # the loop has ended: nothing waits for it
            loop.call_soon_threadsafe(_set_outcome, loading, outcome)

    async def _begin_serving(self, served: ServedModel) -> None:
        """Report "ready" once the engine has generated a first token."""
        await served.first_token()
        gc.collect()
        gc.freeze()  # the loaded model stays: collecting over its objects would stop every answer for 60 ms
        for _ in served.refused_adapters:
            self._metrics.adapter_failed("refused")
        self._lifecycle.ready(served)
        log.info("Model loaded successfully")
        log.info("Serving %s", ", ".join(served.models()))
        password = " (any user name, the API key as the password)" if self._keys is not None else ""
        log.info("Chat page: %s/%s", self._url, password)
        log.info("Routes: %s/docs", self._url)
        log.info("OpenAI API: %s/v1", self._url)

    async def _until_stopped(self) -> None:
        """Wait for a signal; a dead engine ends the process, so that it is restarted."""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._stop.wait()
            served = self._lifecycle.loaded
            if served is not None and not served.engine.stats().alive:
                raise Failure("the engine has died; the log says why")

    async def _drain(self) -> None:
        """Report "not ready", then refuse requests, then wait; `run` then cancels what is still in flight."""
        config, lifecycle = self._config, self._lifecycle
        lifecycle.drain()
        if lifecycle.loaded is None:
            return
        await asyncio.sleep(config.drain_delay_s)
        lifecycle.refuse()
        answers_s = max(0.8 * config.drain_timeout_s, config.drain_timeout_s - CLOSE_TIMEOUT_S)
        _exit_within(answers_s + CLOSE_TIMEOUT_S, lambda: self._closing)
        try:
            async with asyncio.timeout(answers_s):
                await lifecycle.idle()
        except TimeoutError:
            log.warning("Not all answers were complete after %g s; cancelling them", answers_s)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            log.warning("Second %s: exiting at once", name)
            os._exit(128 + number)
        log.info("%s: draining", name)
        self._stop.set()


def _exit_within(seconds: float, closing: Callable[[], str]) -> None:
    """End the process after `seconds` whatever it does: the engine may be inside a step that takes longer.

    A supervisor kills it a little later anyway, and then nothing says why; here `closing` does.
    """

    def end() -> None:
        log.error("Not closed %g s after SIGTERM: still waiting for %s; exiting", seconds, closing())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class _Server(uvicorn.Server):
    """uvicorn's life of a server, without its signal handling and its way of accepting connections."""

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, limits: Limits, metrics: ServingMetrics
    ) -> None:
        super().__init__(config)
        connections = OpenConnections(asyncio.get_running_loop().time)
        shared = Shared(config, self.server_state, limits, connections, metrics.refused)
        self._acceptor = Acceptor(
            listener,
            connections,
            lambda reserved: Connection(shared, reserved=reserved),
            limit=connection_limit(limits.connections),
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._acceptor.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the connections; uvicorn cancels tasks instead, and leaves unread answers open."""
        self._acceptor.close()
        connections = cast("set[Connection]", self.server_state.connections)
        for connection in tuple(connections):
            connection.shutdown()
        if not await _emptied(connections, LAST_READ_S):
            log.warning("Cut off %d connections whose clients did not read their answers", len(connections))
            for connection in tuple(connections):
                connection.cut_off()
        await _emptied(self.server_state.tasks, LAST_TASKS_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _emptied(waited_for: Sized, seconds: float) -> bool:
    """Return whether nothing is left of `waited_for` within `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while waited_for:
                await asyncio.sleep(0.02)
    return not waited_for


def _set_outcome(loading: "asyncio.Future[ServedModel]", outcome: ServedModel | BaseException) -> None:
    if loading.cancelled():
        return
    if isinstance(outcome, BaseException):
        loading.set_exception(outcome)
    else:
        loading.set_result(outcome)
