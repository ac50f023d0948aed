"""One request on its way through an engine: the engine's thread posts tokens, the event loop reads them.

Knows threads and event loops, not models. Start at `Ticket.post` and `Ticket.read`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from runtime.serving.engine.protocol import Request, Start, Token


class Ticket:
    """A request in flight; made in the event loop that reads the answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        """Set from any thread; the engine looks at it before each step."""
        self.start: Start | None = None
        """Set with the row, posted with the first token."""
        self._submitted_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Token | Exception] = asyncio.Queue()

    def begin(self) -> None:
        """Note that the request has a row."""
        self.start = Start(queued_s=time.monotonic() - self._submitted_s, cached_tokens=0)

    def found(self, cached_tokens: int) -> None:
        """Note how much of the prompt was in the cache."""
        if self.start is not None:
            self.start = replace(self.start, cached_tokens=cached_tokens)

    def post(self, item: Token | Exception) -> None:
        """Hand a token, the end or a failure to the reader; from any thread."""
        if isinstance(item, Token) and self.start is not None:
            item, self.start = replace(item, start=self.start), None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    async def read(self, on_leave: Callable[[], None]) -> AsyncIterator[Token]:
        """Yield tokens until the end; raise what was posted as a failure. `on_leave` runs however it ends."""
        try:
            while True:
                item = await self._outbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.id is None:
                    return
        finally:
            on_leave()
