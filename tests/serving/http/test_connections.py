"""HTTP as clients speak it, well and badly, byte by byte over real sockets to one server."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Process, start_fake_server, until

HEAD = b"POST /chat HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"prompt": "hi", "max_new_tokens": 2}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
JAVA = (
    b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    b"Upgrade: h2c\r\nUser-Agent: Java-http-client/21\r\nContent-Type: application/json\r\n"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    options = {"config": {"limits": {"header_timeout_s": 1.0, "body_timeout_s": 1.0}}}
    started = start_fake_server(**options)
    yield started
    started.close()


@dataclass
class Reply:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])


def connect(server: Process) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    client.settimeout(60)
    return client


def read(client: socket.socket) -> Reply:
    """Read one answer: by its length, its chunks, or to the end of the connection."""
    with client.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = {}
        while line := stream.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if "content-length" in headers:
            body = stream.read(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(stream.readline(), 16):
                body += stream.read(size)
                stream.readline()
            stream.readline()
        else:
            body = b"" if status in {100, 204} else stream.read()
        closed = "close" in headers.get("connection", "") and stream.read() == b""
    return Reply(status, headers, body, closed)


def answer(server: Process, sent: bytes) -> Reply:
    """Send bytes on a connection of their own and return the answer."""
    with connect(server) as client:
        with contextlib.suppress(ConnectionError):  # it may be refused before it was sent
            client.sendall(sent)
        return read(client)


@pytest.mark.parametrize("framing", [LENGTH + b"\r\n" + BODY, CHUNKED + b"\r\n" + CHUNKS])
@pytest.mark.parametrize("piece", [1, 50, 10_000])
def test_offer_of_http2_is_passed_over_and_the_body_read(server: Process, framing: bytes, piece: int) -> None:
    """What Java's HttpClient sends to http:// unless it is told not to."""
    sent = HEAD + JAVA + framing
    with connect(server) as client:
        for _ in range(2):  # the connection is kept
            for start in range(0, len(sent), piece):
                client.sendall(sent[start : start + piece])
            reply = read(client)
            assert (reply.status, json.loads(reply.body)["usage"]["completion_tokens"]) == (200, 2)


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")
def test_java_client_as_it_comes(server: Process, tmp_path: Path) -> None:
    program = tmp_path / "Client.java"
    program.write_text(
        """
        import java.net.URI; import java.net.http.*;
        public class Client { public static void main(String[] a) throws Exception {
            var body = HttpRequest.BodyPublishers.ofString("{\\"prompt\\": \\"hi\\"}");
            var client = HttpClient.newHttpClient();
            for (int i = 0; i < 2; i++) {
                var request = HttpRequest.newBuilder(URI.create(a[0] + "/chat")).POST(body).build();
                System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
            }
        }}
        """,
        encoding="utf-8",
    )
    command = ["java", str(program), server.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == ["200", "200"], ran.stderr


def test_other_offers_of_a_protocol_are_passed_over(server: Process) -> None:
    offer = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    assert answer(server, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n").status == 200
    refused = answer(server, b"CONNECT other:443 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (refused.status, refused.error["message"]) == (400, "CONNECT is not served here: this is no proxy")


@pytest.mark.parametrize("version", [b"1.0", b"0.9"])
def test_older_clients_get_no_chunks(server: Process, version: bytes) -> None:
    body = b'{"prompt": "hi", "max_new_tokens": 2, "stream": true}'
    head = b"POST /chat HTTP/%b\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n" % (
        version,
        len(body),
    )
    stream = answer(server, head + body)
    assert "transfer-encoding" not in stream.headers
    assert stream.body.startswith(b"data: {")
    assert stream.body.endswith(b"data: [DONE]\n\n")
    whole = answer(server, b"GET /livez HTTP/%b\r\n\r\n" % version)
    assert (whole.body, whole.closed) == (b'{"status":"Healthy"}', True)


def test_head_has_the_length_and_no_body(server: Process) -> None:
    with connect(server) as client:
        client.sendall(GET.replace(b"GET", b"HEAD") + GET)
        received = b""
        while received.count(b"\r\n\r\n") < 2 or not received.endswith(b"}"):
            received += client.recv(4096)
    assert received.count(b"content-length: 20") == 2
    assert received.count(b"Healthy") == 1


def test_continue_comes_after_the_checks(server: Process) -> None:
    expect = HEAD + b"Expect: 100-continue\r\n"
    with connect(server) as client:
        client.sendall(expect + LENGTH + b"\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert read(client).status == 200
    large = answer(server, expect + b"Content-Length: 999999999\r\n\r\n")
    assert (large.status, large.closed) == (413, True)


def fields(count: int, size: int = 1) -> bytes:
    return b"".join(b"x-%d: %b\r\n" % (number, b"v" * size) for number in range(count))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (GET[:-2] + fields(99) + b"\r\n", 200),
        (GET[:-2] + fields(100) + b"\r\n", 431),
        (GET[:-2] + fields(1, 60_000) + b"\r\n", 200),
        (b"GET /livez HTTP/1.1\r\n" + fields(1, 70_000) + b"\r\n", 431),
        (b"GET /livez HTTP/1.1\r\n" + fields(99, 700) + b"\r\n", 431),
        (b"GET /livez HTTP/1.1\r\n" + fields(1, 4_000_000), 431),
        (b"GET /livez HTTP/1.1\r\n" + b"x" * 4_000_000, 431),
        (b"GET /livez HTTP/1.1\r\n" + b"a:b\r\n" * 800_000, 431),
        (b"GET /" + b"x" * 4_000_000, 431),
        (b"\r\n" * 2_000_000, 431),
        (HEAD + CHUNKED + b"\r\n" + CHUNKS[:-2] + fields(101), 431),
    ],
    ids=[
        "100",
        "101",
        "60 kB",
        "70 kB",
        "99 long",
        "value",
        "name",
        "4 MB of fields",
        "URL",
        "lines",
        "trailers",
    ],
)
def test_headers_have_a_limit(server: Process, sent: bytes, status: int) -> None:
    assert answer(server, sent).status == status


@pytest.mark.parametrize("before", [b"", GET])
def test_headers_in_pieces_have_the_same_limit(server: Process, before: bytes) -> None:
    with connect(server) as client:
        if before:
            client.sendall(before)
            assert read(client).status == 200
        client.sendall(b"GET /livez HTTP/1.1\r\nx: ")
        for _ in range(70):
            client.sendall(b"v" * 1000)
        refused = read(client)
    assert (refused.status, refused.closed) == (431, True)


def test_fields_after_a_body_add_nothing_to_the_request(server: Process) -> None:
    trailer = CHUNKS[:-2] + b"x-request-id: forged\r\n\r\n"
    reply = answer(server, HEAD + CHUNKED + b"\r\n" + trailer)
    assert reply.status == 200
    assert reply.headers["x-request-id"] != "forged"


MALFORMED = {
    "binary": b"\x00\x01\x02\r\n\r\n",
    "no method": b"hello\r\n\r\n",
    "two lengths": HEAD + LENGTH + b"Content-Length: 1\r\n\r\n" + BODY,
    "length and chunks": HEAD + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "length -1": HEAD + b"Content-Length: -1\r\n\r\n",
    "length +3": HEAD + b"Content-Length: +3\r\n\r\n",
    "length of 30 digits": HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "chunk size of 20 digits": HEAD + CHUNKED + b"\r\n" + b"f" * 20 + b"\r\n",
    "chunk size xyz": HEAD + CHUNKED + b"\r\nxyz\r\n",
    "no chunk end": HEAD + CHUNKED + b"\r\n1\r\nxxxx\r\n",
    "endless chunk extension": HEAD + CHUNKED + b"\r\n1;" + b"x" * 2_000_000,
    "chunks of one byte": HEAD + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 800_000,
    "endless trailer": HEAD + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"x: " + b"x" * 2_000_000,
    "path in UTF-8": b"GET /\xc3\xa4 HTTP/1.1\r\n\r\n",
    "NUL in a field": b"GET / HTTP/1.1\r\nx: \x00\r\n\r\n",
    "folded field": b"GET / HTTP/1.1\r\nx: a\r\n b\r\n\r\n",
    "space before the colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "version 9": b"GET / HTTP/9.9\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_is_one_400(server: Process, name: str) -> None:
    reply = answer(server, MALFORMED[name])
    assert (reply.status, reply.closed) == (400, True)
    assert reply.headers["content-type"] == "application/json"
    assert len(reply.headers["x-request-id"]) == 16
    assert reply.error["type"] == "invalid_request_error"
    assert "\n" not in reply.error["message"]
    assert len(reply.error["message"]) < 200


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, "has no Host"),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nhost: localhost\r\n\r\n", 400, "2 Host fields"),
        (b"GET /livez HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400, "2 Host fields"),
        (b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "not a name or address"),
        (b"GET /livez HTTP/1.1\r\nHost: evil.test/x\r\n\r\n", 400, "not a name or address"),
        (b"GET http://evil.test/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 403, "'evil.test'"),
        (b"GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n", 400, "2 Host fields"),
        (b"GET http://u:p@localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "not a name or address"),
        (b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n", 505, "HTTP/2.0 is not spoken here"),
    ],
)
def test_requests_for_no_certain_host_or_version_are_refused(
    server: Process, sent: bytes, status: int, said: str
) -> None:
    reply = answer(server, sent)
    assert reply.status == status
    assert said in reply.error["message"]


@pytest.mark.parametrize(
    "target",
    [
        b"/livez HTTP/1.0",
        b"http://127.0.0.1:80/livez HTTP/1.0",
        b"http://localhost/livez HTTP/1.1\r\nHost: evil.test",
        b"http://[::1]:5000/livez?a=b HTTP/1.1\r\nHost: [::1]:5000",
        b"HTTP://LOCALHOST HTTP/1.1\r\nHost: localhost",
        b"/livez HTTP/1.1\r\nHost: my_service-1.localhost:5000",
        b"/livez HTTP/1.1\r\nHost:",
    ],
)
def test_every_way_to_name_a_known_host_is_taken(server: Process, target: bytes) -> None:
    assert answer(server, b"GET " + target + b"\r\n\r\n").status == 200


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (bytes.fromhex("16030102000100") + b"x" * 512, "this port speaks http, not https"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2 is not spoken here"),
    ],
)
def test_other_protocols_are_named(server: Process, sent: bytes, said: str) -> None:
    assert said in answer(server, sent).error["message"]


def test_another_transfer_encoding_is_not_read_as_a_body(server: Process) -> None:
    assert answer(server, HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS).status == 501


def test_refusals_are_counted_and_one_log_line(server: Process) -> None:
    for _ in range(200):
        assert answer(server, b"\x00\r\n\r\n").status == 400
    counted = next(line for line in server.get("/metrics").text.splitlines() if 'status="400"' in line)
    assert float(counted.split()[-1]) >= 200
    assert sum("Refused a request" in line for line in server.log) <= 1
    assert not any("Traceback" in line or "Invalid HTTP request" in line for line in server.log)


@pytest.mark.parametrize(("requests", "answers"), [(3, 3), (9, 9), (500, 9)])
def test_pipelined_requests_are_answered_in_order_up_to_a_limit(
    server: Process, requests: int, answers: int
) -> None:
    sent = b"".join(GET.replace(b"\r\n\r\n", b"\r\nX-Request-Id: r%d\r\n\r\n" % n) for n in range(requests))
    with connect(server) as client:
        client.sendall(sent)
        received = b""
        while received.count(b"x-request-id") < answers and (data := client.recv(65536)):
            received += data
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while data := client.recv(65536):
                received += data
    ids = [line for line in received.split(b"\r\n") if line.startswith(b"x-request-id")]
    assert ids == [b"x-request-id: r%d" % number for number in range(answers)]


def test_garbage_after_a_request_does_not_take_its_answer(server: Process) -> None:
    reply = answer(server, HEAD + LENGTH + b"\r\n" + BODY + b"\x00\x01\r\n\r\n")
    assert (reply.status, reply.closed) == (200, True)


def test_client_that_sends_on_reads_why_it_was_refused(server: Process) -> None:
    """Closing at once would reset the connection, which discards the answer."""
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 50000000\r\n\r\n")
        for _ in range(200):
            with contextlib.suppress(ConnectionError):
                client.sendall(b"x" * 10_000)
        assert read(client).status == 413


def test_client_that_never_stops_sending_is_cut(start_server: Any) -> None:
    server = start_server()
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 999999999999\r\n\r\n")
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"x" * 100_000)


def test_small_refused_body_keeps_its_connection(server: Process) -> None:
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Type: image/png\r\nContent-Length: 1000\r\n\r\n")
        assert read(client).status == 415
        client.sendall(b"x" * 1000 + GET)
        assert read(client).status == 200
        time.sleep(1.2)  # longer than headers may take: it is idle, not late
        client.sendall(GET)
        assert read(client).status == 200


def test_small_refused_body_that_does_not_come_ends_the_connection(server: Process) -> None:
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Type: image/png\r\nContent-Length: 1000\r\n\r\n")
        assert read(client).status == 415
        assert client.recv(10) == b""


def test_pipelined_clients_that_leave_are_noticed(start_server: Any) -> None:
    server = start_server(engine={"rows": 4, "queue": 8, "pace_s": 0.05, "context_tokens": 4096})
    body = b'{"prompt": "hi", "max_new_tokens": 2000}'
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + GET)
        until(lambda: server.running() == 1)
    assert until(lambda: server.running() == 0) < 1
