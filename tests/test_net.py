"""Retries, ranges and event streams: what every HTTP client of this project has in common."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import net
from runtime.errors import TransientError
from runtime.net import EventReader, RetriableError, Retries, first_byte, retry_after_s
from runtime.serving.terminal import Conversation
from tests.costs import assert_linear


def standard_events(body: bytes) -> list[str]:
    """Return the data of the events in `body`, by the steps of the standard, character for character."""
    text = body.decode("utf-8", errors="replace").removeprefix("\ufeff")
    lines, line, position = [], "", 0
    while position < len(text):  # a last line without an end is no line
        character = text[position]
        position += 1
        if character not in "\r\n":
            line += character
            continue
        if character == "\r" and text[position : position + 1] == "\n":
            position += 1
        lines.append(line)
        line = ""
    found, data = [], ""
    for line in lines:
        if line == "":
            if data != "":
                found.append(data.removesuffix("\n"))
            data = ""
        elif line.startswith(":"):
            continue
        else:
            name, colon, value = line.partition(":")
            if colon and value.startswith(" "):
                value = value[1:]
            if name == "data":
                data += value + "\n"
    return found


PARTS = [
    b"data", b":", b" ", b"data: ", b"\r", b"\n", b"\r\n", b"\n\n", b"event: x\n", b"id", b": ping\n", b"{}",
    b"\xef\xbb\xbf", "\u2028".encode(), "\x85".encode(), "é😀".encode(), b"\xe2\x80", b"\x00", b"\x0b\x1c",
]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=40), st.data())
def test_events_are_those_of_the_standard_wherever_the_body_is_cut(
    parts: list[bytes], data: st.DataObject
) -> None:
    body = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert list(net.events(chunks)) == standard_events(body)
    assert list(net.events(body[n : n + 1] for n in range(len(body)))) == standard_events(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("data: a\n\n", ["a"]),
        ("data:a\r\rdata:  b\r\n\r\n", ["a", " b"]),
        ("data: a\ndata: b\n\n", ["a\nb"]),
        ("data\n\ndata\ndata\n\n", ["", "\n"]),
        (": ping\n\nevent: x\nid: 1\nretry: 10\n\ndata: a\n: between\n\n", ["a"]),
        ("data: cut off\n", []),
        ("\ufeffdata: a\n\n\ufeffdata: b\n\n", ["a"]),
        ("data: a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n\n", ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"]),
    ],
)
def test_event_stream(body: str, expected: list[str]) -> None:
    assert EventReader().feed(body.encode()) == expected == standard_events(body.encode())


def test_an_endless_line_or_event_ends_the_stream() -> None:
    reader = EventReader(largest=1000)
    assert reader.feed(b"data: " + b"x" * 900 + b"\n\n") == ["x" * 900]
    with pytest.raises(TransientError, match="larger than 1000 bytes"):
        for _ in range(1000):
            reader.feed(b"xx")
    reader = EventReader(largest=1000)
    with pytest.raises(TransientError, match="larger than 1000 bytes"):
        for _ in range(1000):
            reader.feed(b"data: x\n")


def test_a_long_line_in_small_pieces_is_copied_once() -> None:
    def feed(pieces: int) -> None:
        reader = EventReader()
        for _ in range(pieces):
            reader.feed(b"x" * 40)

    assert_linear(feed, 5_000, 80_000)


@contextmanager
def serving(chunks: list[bytes], *, pause_s: float = 0.0) -> Iterator[str]:
    """Answer every request with an event stream whose body is sent in these chunks; yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    received = b""
                    while b"\r\n\r\n" not in received:
                        received += connection.recv(65536)
                    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
                    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
                    for chunk in [*chunks, b""]:
                        connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                        time.sleep(pause_s)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


SEPARATORS = "a\u2028b\u2029c\x85d 😀"


def completion(text: str) -> bytes:
    """Return a streamed chat completion as other servers write it: JSON with all characters as they are."""
    usage = {"completion_tokens": 2, "prompt_tokens": 3}
    events = [
        {"choices": [{"index": 0, "delta": {"content": text}}]},
        {"choices": [], "usage": usage},
    ]
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events]
    return "".join([*lines, "data: [DONE]\r\n\r\n"]).encode()


def test_clients_read_line_separators_cut_at_every_byte() -> None:
    body = completion(SEPARATORS)
    cut = [body[n : n + 1] for n in range(len(body))]
    with serving(cut, pause_s=0.0005) as address, httpx.Client(base_url=address) as client:
        conversation = Conversation(client, "m", ("m",))
        assert "".join(conversation.ask("?")) == SEPARATORS
        assert conversation.new_tokens == 2


def test_async_events_are_the_same() -> None:
    import asyncio

    async def read() -> list[str]:
        async def chunks():  # type: ignore[no-untyped-def]
            yield b"data: a\r"
            yield b"\n\r\ndata: b\n"
            yield b"\n"

        return [event async for event in net.async_events(chunks())]

    assert asyncio.run(read()) == ["a", "b"]


def waits(*errors: RetriableError, attempts: int = 6, backoff_s: float = 1.0) -> list[float]:
    """Return what is waited for after each of `errors`."""
    slept: list[float] = []
    retries = Retries("GET x", attempts=attempts, backoff_s=backoff_s, sleep=slept.append)
    for error in errors:
        retries.failed(error)
    return slept


def test_waits_double_with_jitter_up_to_the_longest() -> None:
    slept = waits(*[RetriableError("reset")] * 9, attempts=10)
    for number, wait_s in enumerate(slept):
        longest = min(net.LONGEST_WAIT_S, 2**number)
        assert longest / 2 <= wait_s <= longest
    assert len({round(waits(RetriableError("reset"))[0], 6) for _ in range(20)}) > 1


def test_retry_after_replaces_the_wait_and_is_never_cut_short() -> None:
    assert waits(RetriableError("answered 503", 0.0), backoff_s=30) == [0.0]
    for _ in range(50):
        (wait_s,) = waits(RetriableError("answered 429", 10.0))
        assert 10 <= wait_s <= 12


def test_too_long_a_retry_after_is_left_to_the_caller() -> None:
    assert waits(RetriableError("answered 429", net.LONGEST_RETRY_AFTER_S))
    with pytest.raises(TransientError, match=r"GET x: answered 429; the next try would be in \d+ s"):
        waits(RetriableError("answered 429", net.LONGEST_RETRY_AFTER_S + 1))


def test_no_try_begins_after_the_deadline() -> None:
    retries = Retries("x", attempts=9, backoff_s=60, deadline=time.monotonic() + 1)
    with pytest.raises(TransientError, match="too late"):
        retries.failed(RetriableError("reset"))


def test_tries_end_unless_there_is_progress() -> None:
    with pytest.raises(TransientError, match="gave up after 3 tries, the last: reset"):
        waits(*[RetriableError("reset")] * 3, attempts=3, backoff_s=0)
    retries = Retries("x", attempts=2, backoff_s=0)
    for _ in range(5):
        retries.progressed()
        retries.failed(RetriableError("reset"))


@pytest.mark.parametrize("status", [200, 206, 400, 401, 404, 409, 416, 501, 505, 507, 511])
def test_other_statuses_are_the_callers(status: int) -> None:
    net.raise_if_retriable(httpx.Response(status))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 524, 599])
def test_busy_statuses_are_tried_again_when_the_server_says(status: int) -> None:
    with pytest.raises(RetriableError, match=f"answered {status}: busy") as caught:
        net.raise_if_retriable(httpx.Response(status, headers={"Retry-After": "7"}), ": busy")
    assert caught.value.retry_after_s == 7


def test_retry_after_is_seconds_or_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert retry_after_s("3") == 3
    assert 98 < (retry_after_s(format_datetime(later, usegmt=True)) or 0) <= 100
    assert retry_after_s("Mon, 01 Jan 2024 00:00:00 GMT") == 0
    for invalid in (None, "", "soon", "-1", "1.5", "²", "Mon, 01 Jan 2024 00:00:00"):
        assert retry_after_s(invalid) is None


@pytest.mark.parametrize(
    ("status", "content_range", "offset", "begins"),
    [
        (200, "", 0, 0),
        (200, "", 500, 0),
        (206, "bytes 500-999/1000", 500, 500),
        (206, "bytes 50-999/1000", 500, None),
        (206, "bytes 0-999/1000", 0, None),
        (206, "", 500, None),
        (416, "bytes */1000", 1000, None),
        (404, "", 0, None),
    ],
)
def test_first_byte_of_a_body(status: int, content_range: str, offset: int, begins: int | None) -> None:
    answer = SimpleNamespace(status_code=status, headers={"Content-Range": content_range})
    assert first_byte(answer, offset) == begins
