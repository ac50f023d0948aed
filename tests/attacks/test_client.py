"""A client that means harm: what it sends costs little, and others are answered meanwhile."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.costs import plain_pass_s
from tests.serving.conftest import Process, start_fake_server, until
from tests.serving.http.test_acceptor import cpu_s
from tests.serving.http.test_body import large
from tests.serving.http.test_connections import CHUNKED, HEAD, answer, connect, read
from tests.serving.http.test_server import resident_kb


def post(path: bytes, **body: Any) -> bytes:
    """Return a request."""
    sent = json.dumps(body, ensure_ascii=False).encode()
    return HEAD.replace(b"/chat", path) + b"Content-Length: %d\r\n\r\n%b" % (len(sent), sent)


MOST_PASSES = 8
"""Plain parses of 4 MB of JSON that a request may cost the server, and so anybody who waits meanwhile."""

FOUR_MB = {
    "fields": b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 800_000,
    "one field": b"GET / HTTP/1.1\r\na: " + b"b" * 4_000_000,
    "URL": b"GET /" + b"a" * 4_000_000,
    "empty lines": b"\r\n" * 2_000_000,
    "chunks of 1 byte": HEAD + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 700_000 + b"0\r\n\r\n",
    "chunks of 20 bytes": HEAD
    + CHUNKED
    + b"\r\n"
    + (b"14\r\n" + b"x" * 20 + b"\r\n") * 160_000
    + b"0\r\n\r\n",
    "extensions": HEAD + CHUNKED + b"\r\n" + (b"14;" + b"e" * 99 + b"\r\n" + b"x" * 20 + b"\r\n") * 32_000,
    "trailers": HEAD + CHUNKED + b"\r\n1\r\nx\r\n0\r\n" + b"a:b\r\n" * 800_000,
    "pipelined": b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 180_000,
    "not HTTP": b"\x00" * 4_000_000,
    "no JSON": HEAD + b"Content-Length: 4000000\r\n\r\n" + b"x" * 4_000_000,
    "one word": post(b"/chat", prompt="ab" * 2_000_000),
    "one word of a conversation": post(b"/chat", messages=[{"role": "user", "content": "ab" * 2_000_000}]),
    "words to count": post(b"/tokenize", prompt="a b " * 1_000_000, return_token_strs=True),
    "one word to count": post(b"/tokenize", prompt="a" * 4_000_000),
    "spaces to count": post(b"/tokenize", prompt=" " * 4_000_000),
    "U+FDFA to count": post(b"/tokenize", prompt="\ufdfa" * 1_300_000),
    "combining marks to count": post(b"/tokenize", prompt="a" + "\u0301" * 2_000_000),
    "as much as is counted": post(b"/tokenize", prompt="a b " * 16_000, return_token_strs=True),
    "ids": post(b"/detokenize", tokens=[1] * 1_300_000),
    "a gzip bomb": HEAD
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
    % (len(bomb := gzip.compress(bytes(1 << 30))), bomb),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    started = start_fake_server(config={"api_key": "sesame"})
    yield started
    started.close()


@contextlib.contextmanager
def probed(server: Process) -> Iterator[None]:
    """Ask /livez every 20 ms in a thread: it is always answered."""
    ended = threading.Event()

    def probe() -> None:
        with connect(server) as client:
            while not ended.wait(0.02):
                client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert read(client).status == 200

    with ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe)
        try:
            yield
        finally:
            ended.set()
        probing.result()


@pytest.mark.parametrize("kind", FOUR_MB)
def test_four_megabytes_of_anything_cost_little(server: Process, kind: str) -> None:
    host = b"Host: localhost\r\n"
    sent = FOUR_MB[kind].replace(host, host + b"Authorization: Bearer sesame\r\n", 1)
    with probed(server):
        before_s = cpu_s(server)
        reply = answer(server, sent)
        used_s = cpu_s(server) - before_s
    assert used_s < MOST_PASSES * plain_pass_s()
    assert reply.status in {200, 400, 413, 431}


@pytest.mark.parametrize("kind", ["messages", "wrong parts", "ids", "wrong stops", "biases", "keys", "depth"])
def test_four_megabytes_of_json_cost_little(server: Process, kind: str) -> None:
    """Every kind, in the test's process: tests/serving/http/test_body.py."""
    sent, route = large(kind)
    with probed(server):
        before_s = cpu_s(server)
        key = {"Authorization": "Bearer sesame"}
        reply = httpx.post(server.url + route, content=sent, headers=key, timeout=60)
        used_s = cpu_s(server) - before_s
    assert used_s < MOST_PASSES * plain_pass_s()
    assert reply.status_code == 400


def refused(server: Process, status: int) -> float:
    """Return how many requests the server says it refused with a status."""
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if f'status="{status}"' in line)


def test_bodies_without_the_key_are_never_kept(server: Process) -> None:
    before = resident_kb(server)
    clients = [connect(server) for _ in range(100)]
    try:
        for client in clients:
            client.sendall(HEAD + b"Content-Length: 4000000\r\n\r\n" + b" " * 60_000)
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(b" " * 400_000)
            assert read(client).status == 401
        assert resident_kb(server) - before < 20_000
    finally:
        for client in clients:
            client.close()


def test_many_slow_uploads_do_not_fill_the_memory() -> None:
    """Eighty clients send all but the last byte of 1 MB: beyond the budget of 20 MB they are refused."""
    limits = {"body_bytes": 1 << 20, "bodies_bytes": 20 << 20}
    server = start_fake_server(config={"limits": limits})
    try:
        before = resident_kb(server)
        clients = [connect(server) for _ in range(80)]
        for client in clients:
            client.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                client.sendall(b" " * 999_999)
        until(lambda: refused(server, 429) >= 59)
        reply = read(clients[-1])
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert resident_kb(server) - before < 60_000
        assert server.get("/livez").status_code == 200
        for client in clients:
            client.close()
        body = b'{"prompt": "%b", "max_new_tokens": 1}' % (b"x" * 200)
        assert answer(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body).status == 200
    finally:
        server.close()


def test_idle_connections_cost_little_memory(server: Process) -> None:
    before = resident_kb(server)
    clients = [connect(server) for _ in range(1000)]
    try:
        assert server.get("/livez").status_code == 200
        assert (resident_kb(server) - before) / 1000 < 25
    finally:
        for client in clients:
            client.close()
