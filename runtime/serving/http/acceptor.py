"""Accepts connections: how many may be open, which make room for new ones, what is done without descriptors.

A connection *waits* while no request on it is being answered: it is idle, or its headers are not complete.
Those are what a client can pile up for nothing, so the longest waiting one is closed for a new one. Where
none waits, a few more are accepted as *reserved*: probes are answered on them, other requests get 503.
Does not know HTTP (connections.py does). Start at `Acceptor`.
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable

from runtime.errors import ConfigError
from runtime.logs import Repeated

log = logging.getLogger(__name__)

CONNECTIONS = 4096
"""Open at one time, where nothing else is set: 60 MB of memory when all are idle."""
RESERVED = 32
"""More of them, for probes."""
OTHER_FILES = 256
"""Descriptors for everything else: weights, adapters, pipes of workers, vLLM's connections."""
MOST_FILES = 65536
SPARES = 8
"""Descriptors that are held only to be given up when there are no others: a connection each."""
PATIENCE_S = 1.0
"""A connection that has waited for less is closed for a new one only when the reserve is full as well."""
ACCEPTED_AT_ONCE = 64
RETRY_S = 0.1

_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def connection_limit(wanted: int | None) -> int:
    """Return how many connections may be open, and raise this process's soft limit on files as far as useful.

    Raises ConfigError when `wanted` are more than the limit on files allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < files:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
            soft = files
    available = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    possible = available - min(OTHER_FILES, available // 2) - RESERVED - SPARES
    if wanted is not None and wanted > possible:
        raise ConfigError(
            f"limits.connections is {wanted}, but this process may open {available} files, which is enough "
            f"for {max(possible, 0)}: lower it, or raise the limit (ulimit -n)"
        )
    return wanted or max(8, min(CONNECTIONS, possible))


class Acceptable(asyncio.Protocol):
    """A connection as the acceptor knows it."""

    reserved: bool
    """Whether it is one more than may be open."""

    def close(self) -> None:
        """Close it soon; `OpenConnections.closed` is called then."""
        raise NotImplementedError


class OpenConnections:
    """The open connections, and in the order in which they began to wait those that do."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: set[Acceptable] = set()
        self._waiting: dict[Acceptable, float] = {}
        self._reserved = 0
        self.on_closed: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._open)

    @property
    def reserved(self) -> int:
        """How many of them are reserved."""
        return self._reserved

    def opened(self, connection: Acceptable) -> None:
        """Count a new connection, which waits."""
        self._open.add(connection)
        self._reserved += connection.reserved
        self._waiting[connection] = self._clock()

    def waits(self, connection: Acceptable) -> None:
        """Note that no request is being answered on it from now on."""
        if connection in self._open:
            self._waiting[connection] = self._clock()

    def works(self, connection: Acceptable) -> None:
        """Note that a request on it is being answered."""
        self._waiting.pop(connection, None)

    def closed(self, connection: Acceptable) -> None:
        """Forget a connection."""
        self._forget(connection)
        self.on_closed()

    def close_longest_waiting(self, at_least_s: float) -> bool:
        """Close the longest waiting connection, if it waits for `at_least_s`; return whether one did."""
        for connection, since_s in self._waiting.items():
            if self._clock() - since_s < at_least_s:
                return False
            self._forget(connection)
            connection.close()
            return True
        return False

    def _forget(self, connection: Acceptable) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._reserved -= connection.reserved
            self._waiting.pop(connection, None)


class Acceptor:
    """Accepts what arrives at a listener, in place of asyncio's server.

    asyncio's waits a second and logs a traceback each time that descriptors are short, and has no limit.
    """

    def __init__(
        self,
        listener: socket.socket,
        connections: OpenConnections,
        connect: Callable[[bool], Acceptable],
        *,
        limit: int,
    ) -> None:
        """`connect` makes a connection, which is reserved or not; `limit` of them may be open."""
        self._listener = listener
        self._connections = connections
        self._connect = connect
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._spares: list[int] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._say_full = Repeated(log)
        self._say_short = Repeated(log)

    def start(self) -> None:
        """Accept from now on."""
        self._refill()
        self._connections.on_closed = self._refill
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Stop, and close the listener."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._connections.on_closed = lambda: None
        while self._spares:
            os.close(self._spares.pop())

    def _accept(self) -> None:
        # A burst waits in the kernel, not in front of a probe: of 1,000 requests at once the slowest /livez
        # takes 0.3 s on two cores.
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._make_room(error)
                return
            self._take(client)

    def _take(self, client: socket.socket) -> None:
        """Serve a connection, as a reserved one where too many are open or its descriptor was a spare."""
        connections = self._connections
        reserved = len(self._spares) < SPARES
        if len(connections) - connections.reserved >= self._limit:
            reserved = not connections.close_longest_waiting(PATIENCE_S) or reserved
            self._say_full(
                logging.WARNING,
                "%d connections are open, the limit: idle ones are closed for new ones",
                self._limit,
            )
        if reserved and connections.reserved >= RESERVED and not connections.close_longest_waiting(0):
            client.close()
            return
        connection = self._connect(reserved)
        connections.opened(connection)
        task = self._loop.create_task(self._open(connection, client))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: Acceptable, client: socket.socket) -> None:
        try:
            client.setblocking(False)
            await self._loop.connect_accepted_socket(lambda: connection, client)
        except OSError:  # gone again
            client.close()
            self._connections.closed(connection)

    def _make_room(self, error: OSError) -> None:
        """Free a descriptor, or wait a little: the listener stays readable, and would be a busy loop."""
        if error.errno in _SHORT:
            self._say_short(
                logging.ERROR,
                "No connection can be accepted: %s. Idle ones are closed, and only probes are answered; "
                "raise the limit on open files (ulimit -n)",
                error.strerror,
            )
            if self._connections.close_longest_waiting(PATIENCE_S):
                return
            if self._spares:
                os.close(self._spares.pop())
                return
            if self._connections.close_longest_waiting(0):
                return
        else:
            self._say_short(logging.ERROR, "No connection can be accepted: %s", error)
        self._loop.remove_reader(self._listener)
        self._retry = self._loop.call_later(RETRY_S, self.start)

    def _refill(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._spares) < SPARES:
                self._spares.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
