"""A few lanes, and a bounded queue before them in which clients take turns.

Does not know what runs in a lane. May be used from any thread and any event loop. Start at `Lanes.enter`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from runtime.errors import OverloadedError


class Lanes:
    """At most `lanes` at a time, one client in at most half of them, and `waiting` more in turn."""

    def __init__(self, lanes: int, waiting: int) -> None:
        self._free = lanes
        self._own = max(1, lanes // 2)
        self._most_waiting = waiting
        self._inside: dict[str, int] = {}
        self._queues: dict[str, deque[Future[None]]] = {}
        """By client, the one whose turn is next first."""
        self._lock = threading.Lock()

    @asynccontextmanager
    async def enter(self, client: str) -> AsyncIterator[None]:
        """Hold a lane while the block runs; OverloadedError at once where too many wait."""
        turn = self._queue(client)
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            if not turn.cancel():  # its turn has come at the same moment
                self._leave(client)
            raise
        try:
            yield
        finally:
            self._leave(client)

    def _queue(self, client: str) -> "Future[None]":
        turn: Future[None] = Future()
        with self._lock:
            waiting = sum(map(len, self._queues.values()))
            if waiting >= self._most_waiting:
                raise OverloadedError(
                    f"{waiting} schemas, patterns or grammars are waiting to be compiled; try again shortly"
                )
            self._queues.setdefault(client, deque()).append(turn)
            self._admit()
        return turn

    def _leave(self, client: str) -> None:
        with self._lock:
            self._free += 1
            self._inside[client] -= 1
            if not self._inside[client]:
                del self._inside[client]
            self._admit()

    def _admit(self) -> None:
        """Give free lanes to those who wait, one a client and round."""
        admitted = True
        while admitted:
            admitted = False
            for client in list(self._queues):
                if self._free and self._inside.get(client, 0) < self._own:
                    admitted |= self._admit_one(client)

    def _admit_one(self, client: str) -> bool:
        queue = self._queues.pop(client)
        turn = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind the others
        if not turn.set_running_or_notify_cancel():  # it has given up
            return True
        self._free -= 1
        self._inside[client] = self._inside.get(client, 0) + 1
        turn.set_result(None)
        return True
