"""Whose turn it is to tokenize, and what happens to the work of clients that leave."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.errors import ClientGoneError, UnavailableError
from runtime.serving.tokenizing import CALLER, SHORT_CHARACTERS, Caller, TokenizingPool

pytestmark = pytest.mark.anyio

LONG = SHORT_CHARACTERS + 1


@pytest.fixture
def pool() -> Iterator[TokenizingPool]:
    made = TokenizingPool()
    yield made
    made.close()


class Blocked:
    """Work that holds the thread for long texts until it is released."""

    def __init__(self) -> None:
        self.begun, self.released, self.stopped = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, stopped: Any) -> str:
        self.begun.set()
        while not self.released.wait(0.005):
            if stopped():
                self.stopped.set()
                break
        return "done"


def run_as(client: str, pool: TokenizingPool, work: Any, **more: Any) -> "asyncio.Task[Any]":
    """Start `work` for a client."""
    CALLER.set(Caller(client, **more))
    return asyncio.create_task(pool.run(work, characters=LONG))


async def test_a_short_text_does_not_wait_for_long_ones(pool: TokenizingPool) -> None:
    blocked = Blocked()
    long = [run_as("a", pool, blocked) for _ in range(5)]
    await asyncio.to_thread(blocked.begun.wait, 60)
    async with asyncio.timeout(60):
        assert await pool.run(lambda stopped: "hi", characters=2) == "hi"
        assert not any(task.done() for task in long)
        blocked.released.set()
        assert await asyncio.gather(*long) == ["done"] * 5


async def test_clients_with_long_texts_take_turns(pool: TokenizingPool) -> None:
    blocked, order = Blocked(), list[str]()
    waiting = [run_as("first", pool, blocked)]
    await asyncio.to_thread(blocked.begun.wait, 60)
    waiting += [
        run_as(client, pool, lambda stopped, client=client: order.append(client)) for client in "aaaabcb"
    ]
    await asyncio.sleep(0)
    blocked.released.set()
    await asyncio.gather(*waiting)
    assert "".join(order) == "abcabaa"


async def test_work_of_a_client_that_left_is_not_begun_or_stops(pool: TokenizingPool) -> None:
    blocked, left = Blocked(), asyncio.get_running_loop().create_future()
    running = run_as("a", pool, blocked, left=lambda: left)
    waiting = run_as("a", pool, lambda stopped: pytest.fail("begun"), left=lambda: left)
    await asyncio.to_thread(blocked.begun.wait, 60)
    left.set_result(None)
    for task in (running, waiting):
        with pytest.raises(ClientGoneError):
            await task
    assert await asyncio.to_thread(blocked.stopped.wait, 5)
    with pytest.raises(ClientGoneError):
        await run_as("a", pool, lambda stopped: pytest.fail("begun"), left=lambda: left)


async def test_failures_of_the_work_are_raised(pool: TokenizingPool) -> None:
    def fails(stopped: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await pool.run(fails, characters=1)
    assert await pool.run(lambda stopped: 1, characters=1) == 1


async def test_a_closed_pool_takes_nothing_and_waits_for_nothing() -> None:
    pool, blocked = TokenizingPool(), Blocked()
    running = run_as("a", pool, blocked)
    await asyncio.to_thread(blocked.begun.wait, 60)
    pool.close()
    with pytest.raises(UnavailableError):
        await pool.run(lambda stopped: 1, characters=1)
    blocked.released.set()
    assert await running == "done"
