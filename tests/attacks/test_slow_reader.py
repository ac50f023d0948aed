"""Clients that do not read what they asked for, or hardly, over real sockets."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.conftest import Process, until

LIMITS = {"write_timeout_s": 1.0, "request_timeout_s": 60.0}
ENGINE = {"rows": 3, "queue": 0, "context_tokens": 100_000}


@contextlib.contextmanager
def client(
    server: Process, method: str, path: str, body: Any = None, *, times: int = 1
) -> Iterator[socket.socket]:
    """Send a request `times` over, on a connection that takes little before it is read."""
    sent = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        opened.settimeout(60)
        opened.sendall((head + sent) * times)
        yield opened


def stream(path: str) -> dict[str, Any]:
    """Return a streamed request for a long answer."""
    texts: dict[str, dict[str, Any]] = {
        "/chat": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/completions": {"prompt": "hi"},
        "/v1/responses": {"input": "hi"},
    }
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {**texts[path], length: 15_000, "stream": True}


def answers(server: Process) -> bool:
    """Return whether another client is answered now."""
    body = {"prompt": "hi", "max_new_tokens": 1}
    return httpx.post(f"{server.url}/chat", json=body, timeout=60).status_code == 200


def cut_off(server: Process) -> int:
    """Return how many clients the log says were cut off."""
    return sum("Cut off 127.0.0.1" in line for line in server.log)


def read_to_the_end(connection: socket.socket) -> int:
    """Return how many bytes come until the server closes the connection, in order or not."""
    count = 0
    with contextlib.suppress(ConnectionError):
        while received := connection.recv(65536):
            count += len(received)
    return count


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_streams_that_nobody_reads_free_their_places(start_server: Any, path: str) -> None:
    server = start_server(engine=ENGINE, config={"limits": LIMITS | {"rows": 3, "queue": 0}})
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(client(server, "POST", path, stream(path)))
        until(lambda: not answers(server), 60)
        until(lambda: cut_off(server) == 3, 60)
        assert answers(server)
        assert server.running() == 0


def test_a_slow_client_that_reads_lives(start_server: Any) -> None:
    server = start_server(engine=ENGINE, config={"limits": LIMITS})
    body = {"prompt": "hi", "max_new_tokens": 3000, "stream": True}
    with client(server, "POST", "/chat", body) as connection:
        received, started = b"", time.monotonic()
        while b"[DONE]" not in received:
            received += connection.recv(2048)
            time.sleep(0.05 if time.monotonic() - started < 3 else 0)  # three times as long as a stall may be
    assert b'"completion_tokens":3000' in received
    assert cut_off(server) == 0


def test_a_complete_answer_that_nobody_reads_is_dropped(start_server: Any) -> None:
    server = start_server(engine=ENGINE, config={"limits": LIMITS})
    with client(server, "POST", "/tokenize", {"prompt": "a b " * 33_000}) as connection:
        until(lambda: cut_off(server) == 1, 60)
        assert answers(server)
        assert read_to_the_end(connection) < 400_000


def test_pages_that_nobody_reads_are_dropped(start_server: Any) -> None:
    server = start_server(engine=ENGINE, config={"limits": LIMITS})
    with client(server, "GET", "/openapi.json", times=9) as connection:
        until(lambda: cut_off(server) == 1, 60)
        assert read_to_the_end(connection) < 9 * len(server.get("/openapi.json").content)


def test_a_byte_a_second_ends_with_the_request_s_time(start_server: Any) -> None:
    server = start_server(
        engine=ENGINE, config={"limits": {"write_timeout_s": 1.0, "request_timeout_s": 2.0}}
    )
    with client(server, "POST", "/tokenize", {"prompt": "a b " * 33_000}) as connection:
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while connection.recv(1024) and not stop.wait(0.1):
                    pass

        reading = threading.Thread(target=drip)
        reading.start()
        try:
            assert until(lambda: cut_off(server) == 1, 20) > 1
        finally:
            stop.set()
            reading.join()


@pytest.mark.parametrize("unread", [False, True])
def test_a_client_that_leaves_frees_its_place_at_once(start_server: Any, *, unread: bool) -> None:
    """Fault 40, with and without an answer that waits for it."""
    engine = ENGINE | {"pace_s": 0 if unread else 0.05}
    server = start_server(engine=engine, config={"limits": {"write_timeout_s": 60.0}})
    with client(server, "POST", "/chat", stream("/chat")):
        until(lambda: server.running() == 1)
        time.sleep(0.3)
    assert until(lambda: server.running() == 0) < 1
