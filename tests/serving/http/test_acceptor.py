"""How many connections are open, which are closed for new ones, and a server without file descriptors."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.serving.http.acceptor import Acceptable, OpenConnections
from tests.serving.conftest import Process, until
from tests.serving.http.test_connections import BODY, GET, HEAD, LENGTH, answer, connect, read


class Recorded(Acceptable):
    def __init__(self) -> None:
        self.reserved = False
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_the_longest_waiting_connection_is_closed_and_none_that_works() -> None:
    now = 0.0
    connections = OpenConnections(lambda: now)
    first, second, third = (Recorded() for _ in range(3))
    for number, one in enumerate((first, second, third)):
        now = float(number)
        connections.opened(one)
    connections.works(first)
    now = 5.0
    assert not connections.close_longest_waiting(4.5)
    assert connections.close_longest_waiting(4.0)
    assert (first.is_closed, second.is_closed, third.is_closed, len(connections)) == (False, True, False, 2)
    connections.waits(first)  # behind the third
    assert connections.close_longest_waiting(0)
    assert (first.is_closed, third.is_closed) == (False, True)
    connections.closed(third)  # told again when its transport is gone
    assert len(connections) == 1


@contextlib.contextmanager
def open_connections(server: Process, count: int) -> Iterator[list[socket.socket]]:
    """Hold connections on which nothing is sent."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(count)]


def test_idle_connections_make_room_for_new_ones(start_server: Any) -> None:
    server = start_server(config={"limits": {"connections": 20}})
    with open_connections(server, 20) as idle:
        time.sleep(1.1)
        with open_connections(server, 5) as new:
            for client in new:
                client.sendall(HEAD + LENGTH + b"\r\n" + BODY)
                assert read(client).status == 200
            assert idle[0].recv(10) == b""
            idle[15].sendall(GET)
            assert read(idle[15]).status == 200
    until(lambda: sum("20 connections are open, the limit" in line for line in server.log) == 1)


def test_probes_are_answered_when_all_connections_work(start_server: Any) -> None:
    server = start_server(
        engine={"rows": 8, "queue": 8, "pace_s": 0.05, "context_tokens": 4096},
        config={"limits": {"connections": 8}},
    )
    body = b'{"prompt": "hi", "max_new_tokens": 2000}'
    with contextlib.ExitStack() as busy:
        for _ in range(12):  # four are refused, or the first of them while a probe's connection is still open
            time.sleep(0.05)
            client = busy.enter_context(connect(server))
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: server.running() == 8)
        assert server.get("/livez").status_code == 200
        assert server.get("/readyz").status_code == 200
        refused = answer(server, HEAD + LENGTH + b"\r\n" + BODY)
        assert (refused.status, refused.headers["retry-after"], refused.closed) == (503, "1", True)
        assert "too many connections" in refused.error["message"]
        with open_connections(server, 100):  # more than the reserve has
            until(lambda: server.get("/livez").status_code == 200)
        assert server.running() == 8


def cpu_s(server: Process) -> float:
    with open(f"/proc/{server.process.pid}/stat", encoding="ascii") as stat:  # noqa: PTH123
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_server_without_descriptors_answers_probes_and_says_so_once(start_server: Any) -> None:
    """Something else holds all files but five, and 200 clients hold connections."""
    server = start_server(files=256, files_left=5)
    with open_connections(server, 200):
        before_s, started = cpu_s(server), time.monotonic()
        took = []
        while time.monotonic() - started < 3:
            asked = time.monotonic()
            assert server.get("/livez").status_code == 200
            took.append(time.monotonic() - asked)
            time.sleep(0.2)
        assert sorted(took)[len(took) // 2] < 1, took  # what a kubelet waits
        assert cpu_s(server) - before_s < 1
    until(lambda: server.get("/metrics").status_code == 200)
    short = [line for line in server.log if "No connection can be accepted" in line]
    assert len(short) == 1
    assert "Too many open files" in short[0]
    assert not any("Traceback" in line for line in server.log)


@pytest.mark.parametrize(
    ("files", "wanted", "expected"),
    [
        ((1024, 1024), None, "728"),
        ((256, 1024), None, "728"),  # the soft limit is raised
        ((64, 64), None, "8"),
        ((1024, 1024), 500, "500"),
        ((1024, 1024), 5000, "limits.connections is 5000, but this process may open 1024 files"),
    ],
)
def test_limit_follows_from_the_files_that_may_be_open(
    files: tuple[int, int], wanted: int | None, expected: str
) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {files}); from runtime import errors\n"
        f"from runtime.serving.http.acceptor import connection_limit\n"
        f"try: print(connection_limit({wanted}))\nexcept errors.ConfigError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(expected)
