"""Which of many ready sockets are served in a turn of the event loop."""

import contextlib
import selectors
import socket
from collections.abc import Iterator

import pytest

from runtime.serving.selector import AT_ONCE, ProbesFirst


@pytest.fixture
def crowd() -> Iterator[tuple[ProbesFirst, list[tuple[socket.socket, socket.socket]]]]:
    """A selector over five turns' worth of connections, as (client, server)."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        selector = stack.enter_context(contextlib.closing(ProbesFirst([listener], ["/livez"])))
        pairs = []
        for _ in range(5 * AT_ONCE):
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            server = stack.enter_context(listener.accept()[0])
            selector.register(server, selectors.EVENT_READ)
            pairs.append((client, server))
        selector.register(listener, selectors.EVENT_READ)
        yield selector, pairs


def test_probe_behind_a_crowd_is_served_in_the_next_turn(crowd: tuple[ProbesFirst, list]) -> None:
    selector, pairs = crowd
    for client, _ in pairs[:-1]:
        client.sendall(b"POST /chat HTTP/1.1\r\n")
    assert len(selector.select(1)) == AT_ONCE
    pairs[-1][0].sendall(b"GET /livez HTTP/1.1\r\n")
    served = {key.fd for key, _ in selector.select(1)}
    assert pairs[-1][1].fileno() in served
    assert len(served) == AT_ONCE + 1


def test_everyone_has_a_turn_though_some_always_send(crowd: tuple[ProbesFirst, list]) -> None:
    """Nobody's bytes are read here, so all stay ready: whoever waited longest comes next."""
    selector, pairs = crowd
    for client, _ in pairs:
        client.sendall(b"POST /chat HTTP/1.1\r\n")
    turns = [{key.fd for key, _ in selector.select(1)} for _ in range(10)]
    assert set.union(*turns[:5]) == set.union(*turns[5:]) == {server.fileno() for _, server in pairs}


def test_new_connections_and_the_loops_own_wake_up_never_wait(crowd: tuple[ProbesFirst, list]) -> None:
    selector, pairs = crowd
    for client, _ in pairs:
        client.sendall(b"POST /chat HTTP/1.1\r\n")
    waker, woken = socket.socketpair()
    with waker, woken, socket.create_connection(pairs[0][1].getsockname()):
        selector.register(woken, selectors.EVENT_READ)
        waker.sendall(b"\0")
        for _ in range(3):
            ready = {key.fileobj for key, _ in selector.select(1)}
            assert woken in ready
            assert any(
                isinstance(one, socket.socket) and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                for one in ready
            )


def test_connection_of_an_old_number_is_a_new_one(crowd: tuple[ProbesFirst, list]) -> None:
    selector, pairs = crowd
    for client, _ in pairs:
        client.sendall(b"POST /chat HTTP/1.1\r\n")
    selector.select(1)
    client, server = pairs[-1]  # looked at: no probe
    selector.unregister(server)
    server.recv(100)
    client.sendall(b"GET /livez HTTP/1.1\r\n")
    selector.register(server, selectors.EVENT_READ)
    assert server in {key.fileobj for key, _ in selector.select(1)}
