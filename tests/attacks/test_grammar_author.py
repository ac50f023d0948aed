"""A client whose schemas, patterns and grammars are made to take hours and gigabytes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

BOMB = {"type": "string", "allOf": [{"pattern": f"^.*a{i}.*$"} for i in range(30)]}
"""831 bytes as the body of a request."""


def bombs(count: int) -> list[dict[str, Any]]:
    """Return bodies that differ, so that no refusal is remembered for the next."""
    return [{"prompt": "x", "guided_json": BOMB | {"title": str(number)}} for number in range(count)]


def slowest_livez_s(url: str, during: threading.Event) -> float:
    """Ask /livez until `during` is set, and return how long the slowest answer took."""
    slowest = 0.0
    with httpx.Client(base_url=url, timeout=60) as client:
        while not during.wait(0.05):
            before = time.monotonic()
            assert client.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - before)
    return slowest


def test_bombs_are_refused_and_others_answered_meanwhile(start_server: Any) -> None:
    server = start_server()
    done = threading.Event()
    with ThreadPoolExecutor(8) as threads, httpx.Client(base_url=server.url, timeout=60) as client:
        livez = threads.submit(slowest_livez_s, server.url, done)
        exploding = [
            threads.submit(httpx.post, server.url + "/chat", json=body, timeout=60) for body in bombs(3)
        ]
        time.sleep(0.3)
        for body in ({"prompt": "hi"}, {"prompt": "hi", "guided_choice": ["yes", "no"]}):
            assert client.post("/chat", json=body).status_code == 200
        assert not all(each.done() for each in exploding)  # 2 s of a processor each
        replies = [each.result() for each in exploding]
        done.set()
        assert livez.result() < 1  # 0.02
    for reply in replies:
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "guided_json"
        assert "2 s of processor time" in reply.json()["error"]["message"]
    assert server.stop() == 0


def test_sigterm_does_not_wait_for_a_bomb(start_server: Any) -> None:
    server = start_server(config={"drain_delay_s": 0, "drain_timeout_s": 1})
    (body,) = bombs(1)
    httpx.post(server.url + "/chat", json={"prompt": "hi", "guided_choice": ["yes"]}).raise_for_status()
    with ThreadPoolExecutor(1) as thread:
        gone = thread.submit(_post, server.url, body)
        time.sleep(0.3)
        assert server.stop() == 0  # 1 where it has to be cut short after 5 s
        assert isinstance(gone.exception(), httpx.HTTPError) or gone.result().status_code != 200


def _post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + "/chat", json=body, timeout=60)


def test_author_that_leaves_takes_his_bomb_with_him(start_server: Any) -> None:
    server = start_server()
    httpx.post(server.url + "/chat", json={"prompt": "hi", "guided_choice": ["yes"]}).raise_for_status()
    for body in bombs(12):  # more than are compiled at once
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/chat", json=body, timeout=0.1)
    before = time.monotonic()
    reply = httpx.post(server.url + "/chat", json={"prompt": "hi", "guided_choice": ["no"]}, timeout=60)
    assert reply.status_code == 200
    assert time.monotonic() - before < 5  # 0.1; 24 s of processors where they are not ended
