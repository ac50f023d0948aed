"""One request on its way through an engine: the engine's thread posts tokens, the event loop reads them.

Knows threads and event loops, not models. Start at `Ticket.post` and `Ticket.read`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from runtime.serving.engine.protocol import FinishReason, Request, Token


class Ticket:
    """A request in flight; made in the event loop that reads the answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        """Set from any thread; the engine looks at it before each step."""
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Token | Exception] = asyncio.Queue()

    def post(self, item: Token | Exception) -> None:
        """Hand a token, the end or a failure to the reader; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    def finish(self, reason: FinishReason) -> None:
        """Post the end of the answer."""
        self.post(Token(None, reason))

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
