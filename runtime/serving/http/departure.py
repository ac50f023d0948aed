"""A request's body, read before, and the news that its client has left, for everybody who waits for it.

ASGI tells one reader that the client has gone; here a route, a stream and the tokenizing threads may all ask.
Start at `Departure`.
"""

import asyncio

from starlette.types import Message, Receive


class Departure:
    """Stands in for a request's `receive`. Enter it around the request; it watches once somebody asks."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._kept = [body]
        self._receive = receive
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        """Return the body, then wait until the client has left."""
        if self._kept:
            return {"type": "http.request", "body": self._kept.pop(), "more_body": False}
        await asyncio.wait((self.left(),))  # awaited itself, it would be cancelled with whoever waits
        return {"type": "http.disconnect"}

    def left(self) -> "asyncio.Future[None]":
        """Return what is done once the client has left; not to be awaited, but passed to asyncio.wait."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return self._left

    def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set_result(None)
