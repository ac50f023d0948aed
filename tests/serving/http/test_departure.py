"""The news that a client has left reaches everybody who waits for its request."""

import asyncio
import json
from typing import Any

import pytest

from runtime.serving.http.departure import Departure

pytestmark = pytest.mark.anyio


async def test_all_who_wait_hear_that_the_client_has_left() -> None:
    gone = asyncio.Event()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    departure = Departure(b"body", receive)
    assert await departure.receive() == {"type": "http.request", "body": b"body", "more_body": False}
    waiting = [asyncio.create_task(departure.receive()) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not departure.left().done()
    gone.set()
    assert await asyncio.gather(*waiting) == [{"type": "http.disconnect"}] * 3
    assert departure.left().done()
    departure.close()


@pytest.mark.parametrize("path", ["/tokenize", "/chat", "/v1/completions"])
async def test_a_text_of_a_client_that_left_is_not_tokenized(open_site: Any, path: str) -> None:
    body = json.dumps({"prompt": "a " * 20_000, "max_tokens": 1}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("192.0.2.1", 1)}
    async with open_site(context_tokens=100_000) as site:
        release = asyncio.Event()
        loop = asyncio.get_running_loop()

        def holds_the_thread(stopped: Any) -> None:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

        other = asyncio.create_task(site.prompts._pool.run(holds_the_thread, characters=100_000))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await site.app({**scope, "headers": [(b"host", b"test")], "http_version": "1.1"}, receive, send)
        release.set()
        await other
        assert site.engine.requests == []
    assert [message["status"] for message in sent if "status" in message] != [200]
