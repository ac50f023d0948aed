"""The request queue without an engine: who starts, who waits, who is refused, and calls on the thread."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from runtime.errors import OverloadedError, UnavailableError, UnknownModelError
from runtime.serving.engine.protocol import Token
from runtime.serving.engine.request_queue import RequestQueue
from tests.serving.engine.calls import collect, make_request


def make_queue() -> RequestQueue:
    """Return a queue for two running and one waiting request, with one adapter."""
    return RequestQueue(max_running=2, max_waiting=1, adapters=lambda: ("a",))


def test_requests_start_in_order_of_arrival_and_one_too_many_is_refused() -> None:
    async def submit_four() -> None:
        queue = make_queue()
        for number in range(3):
            queue.submit(make_request(id=str(number)))
        with pytest.raises(OverloadedError, match="1 requests are waiting"):
            queue.submit(make_request(id="3"))
        first, second = queue.take(wait=True)
        assert [first.request.id, second.request.id] == ["0", "1"]
        assert (queue.running, queue.waiting, queue.take(wait=False)) == (2, 1, [])
        queue.finish(first, "stop")
        assert [handle.request.id for handle in queue.take(wait=True)] == ["2"]

    asyncio.run(submit_four())


def test_a_queue_that_one_client_fills_takes_the_first_request_of_another() -> None:
    async def submit() -> None:
        queue = RequestQueue(max_running=1, max_waiting=3, adapters=lambda: ())
        for number in range(4):
            queue.submit(replace(make_request(id=f"list-{number}"), client="list"))
        queue.submit(replace(make_request(id="other"), client="other"))
        for client in ("list", "other"):
            with pytest.raises(OverloadedError):
                queue.submit(replace(make_request(id="more"), client=client))
        order = []
        for _ in range(5):
            (handle,) = queue.take(wait=True)
            order.append(handle.request.id)
            queue.finish(handle, "stop")
        assert order == ["list-0", "other", "list-1", "list-2", "list-3"]

    asyncio.run(submit())


def test_a_full_queue_grows_to_twice_its_size_at_most() -> None:
    async def submit() -> None:
        queue = RequestQueue(max_running=1, max_waiting=3, adapters=lambda: ())
        for number in range(4):
            queue.submit(replace(make_request(id=f"list-{number}"), client="list"))
        for number in range(4):
            queue.submit(replace(make_request(id=f"other-{number}"), client=f"other-{number}"))
        with pytest.raises(OverloadedError):
            queue.submit(replace(make_request(id="last"), client="last"))

    asyncio.run(submit())


def test_the_reader_gets_tokens_then_the_end_with_the_waiting_time_on_the_first() -> None:
    async def read() -> list[Token]:
        queue = make_queue()
        tokens = queue.submit(make_request())
        (handle,) = queue.take(wait=True)
        handle.note_cached(3)
        for id_ in (7, 8):
            handle.post(Token(id_))
        queue.finish(handle, "length")
        return [token async for token in tokens]

    first, second, end = asyncio.run(read())
    assert first.start is not None
    assert (first.start.cached_tokens, second.start) == (3, None)
    assert (first.id, second.id, end.id, end.finish_reason) == (7, 8, None, "length")


def test_a_draining_adapter_is_refused_until_its_requests_have_ended() -> None:
    async def drain() -> None:
        queue = make_queue()
        queue.submit(make_request(adapter="a"))
        (handle,) = queue.take(wait=True)
        drained = asyncio.create_task(asyncio.to_thread(queue.drain_adapter, "a"))
        while queue.adapters():
            await asyncio.sleep(0.001)
        with pytest.raises(UnknownModelError, match="adapter 'a' is not loaded"):
            queue.submit(make_request(adapter="a"))
        assert not drained.done()
        queue.finish(handle, "stop")
        await drained
        queue.adapter_removed("a")
        assert queue.adapters() == ("a",)

    asyncio.run(drain())


def test_a_call_runs_on_the_thread_that_takes_and_raises_in_the_callers() -> None:
    queue = make_queue()
    threads: list[str] = []

    def fail() -> None:
        threads.append(threading.current_thread().name)
        raise ValueError("what it raises")

    with ThreadPoolExecutor(1, thread_name_prefix="caller") as callers:
        called = callers.submit(queue.call, fail)
        assert queue.take(wait=True) == []
        with pytest.raises(ValueError, match="what it raises"):
            called.result(5)
    assert threads == [threading.current_thread().name]


def test_close_ends_waiting_requests_marks_running_ones_and_fails_calls() -> None:
    async def close() -> None:
        queue = make_queue()
        for number in range(3):
            tokens = queue.submit(make_request(id=str(number)))
        running = queue.take(wait=True)
        with ThreadPoolExecutor(1) as callers:
            called = callers.submit(queue.call, lambda: None)
            while not queue._has_work():
                await asyncio.sleep(0.001)
            queue.close("cancelled")
            with pytest.raises(UnavailableError, match="has stopped"):
                called.result(5)
        assert await collect(tokens) == ([], "cancelled")
        assert all(handle.cancelled for handle in running)
        with pytest.raises(UnavailableError, match="has stopped"):
            queue.submit(make_request())

    asyncio.run(close())
