"""A proxy in front of a real registry that breaks what a test chooses, and keeps a list of requests.

The registry behind it is Debian's; here are only the faults, an Azure registry's limits, and a token
server on the same port as Azure has it. Start at `FaultyRegistry.fault`.
"""

import http.client
import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["status", "reset before", "reset after", "reset half", "hang", "cut", "flip", "wrong digest"]
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Fault:
    """What to do to the next `times` requests that match."""

    method: str
    path: str
    kind: Kind
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int = 1
    skip: int = 0
    least: int = 0
    """Only for bodies of this many bytes."""
    done: int = 0

    def applies(self, method: str, path: str, length: int) -> bool:
        if (
            self.done >= self.times
            or length < self.least
            or not re.fullmatch(self.method, method)
            or not re.search(self.path, path)
        ):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.done += 1
        return True


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    length: int
    status: int
    authorization: str
    content_range: str


class FaultyRegistry(http.server.ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1; `upstream` is the port of the real registry."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.upstream = 0
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.body_limit: int | None = None
        """Answer 413 to larger bodies, as Azure does above about 20 MB."""
        self.remembers = True
        """Take requests for an upload at any of its addresses, as Azure does and the OCI specification wants;
        Debian's registry knows only the newest and answers 404 to the others."""
        self.uploads: dict[str, tuple[str, int]] = {}
        """The newest query and offset of each upload."""
        self.begun: list[tuple[str, str]] = []
        """Method and path of each request as soon as its headers are there."""
        self.proxied: list[str] = []
        """Hosts that clients requested as if this were a proxy."""
        self.slow_bytes_s: float | None = None
        """Take uploads no faster than this."""
        self.routes: dict[str, Callable[[str, str, dict[str, str], bytes], Answer]] = {}
        """Path prefixes answered here instead of upstream."""
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str, path: str, kind: Kind, **options: object) -> Fault:
        made = Fault(method, path, kind, **options)  # type: ignore[arg-type]
        self.faults.append(made)
        return made

    def count(self, method: str, path: str = "") -> int:
        return sum(1 for s in self.seen if re.fullmatch(method, s.method) and re.search(path, s.path))

    def sent(self) -> int:
        """Bytes of upload bodies that arrived."""
        return sum(s.length for s in self.seen if s.method in {"PATCH", "PUT"} and "/blobs/" in s.path)

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are the point here."""


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyRegistry

    def handle_any(self) -> None:
        server = self.server
        method, path = self.command, self.path
        if path.startswith("http://"):  # requested as from a proxy
            server.proxied.append(urlsplit(path).netloc)
            path = path.removeprefix(f"http://{urlsplit(path).netloc}")
        length = int(self.headers.get("Content-Length") or 0)
        server.begun.append((method, path))
        with server.lock:
            fault = next((f for f in server.faults if f.applies(method, path, length)), None)
        if fault and fault.kind == "reset before":
            self.reset(0)
            return
        if fault and fault.kind == "hang":
            self.rfile.read(length)
            self.note(0, length)
            time.sleep(float(fault.headers.get("seconds", 5)))
            self.close_connection = True
            return
        if method == "PATCH" and (
            self.headers.get("Transfer-Encoding") or "bytes" in self.headers.get("Content-Range", "")
        ):
            self.answer(
                (400, {}, b'{"errors":[{"code":"BLOB_UPLOAD_INVALID","message":"not how Azure wants it"}]}'),
                0,
            )
            return
        if server.body_limit is not None and length > server.body_limit:
            self.close_connection = True
            self.answer((413, {"Connection": "close"}, b""), 0)
            return
        body = self.read_body(length // 2 if fault and fault.kind == "reset half" else length)
        if fault and fault.kind == "reset half":
            self.forward(method, path, body)
            self.reset(len(body))
            return
        if fault and fault.kind == "status":
            self.answer((fault.status, fault.headers, fault.body), length)
            return
        route = next((r for prefix, r in server.routes.items() if path.startswith(prefix)), None)
        if route is not None:
            self.answer(route(method, path, dict(self.headers), body), length)
            return
        if server.remembers and (moved := self.wrong_offset(method, path)) is not None:
            self.answer(moved, length)
            return
        status, headers, data = self.forward(method, path, body)
        if fault and fault.kind == "reset after":
            self.note(status, length)
            self.reset(0, noted=True)
        elif fault and fault.kind == "cut":
            self.answer((status, headers, data), length, cut=len(data) // 2)
        elif fault and fault.kind == "flip":
            middle = len(data) // 2
            self.answer(
                (status, headers, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]), length
            )
        elif fault and fault.kind == "wrong digest":
            headers = {k: v for k, v in headers.items() if k.lower() != "docker-content-digest"}
            self.answer((status, headers | {"Docker-Content-Digest": "sha256:" + "0" * 64}, data), length)
        else:
            self.answer((status, headers, data), length)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815 - its names

    def read_body(self, length: int) -> bytes:
        if self.server.slow_bytes_s is None or not length:
            return self.rfile.read(length)
        chunks = []
        while length:
            chunk = self.rfile.read(min(length, 1 << 20))
            if not chunk:
                break
            chunks.append(chunk)
            length -= len(chunk)
            time.sleep(len(chunk) / self.server.slow_bytes_s)
        return b"".join(chunks)

    def wrong_offset(self, method: str, path: str) -> Answer | None:
        """Return a 416 when a chunk does not start where the upload is."""
        state = self.server.uploads.get(_upload_id(path))
        start = self.headers.get("Content-Range", "").partition("-")[0]
        if method != "PATCH" or state is None or not start or int(start) == state[1]:
            return None
        return 416, {"Range": f"0-{max(0, state[1] - 1)}", "Location": path}, b""

    def forward(self, method: str, path: str, body: bytes) -> Answer:
        server, upload = self.server, _upload_id(path)
        if server.remembers and upload in server.uploads:
            digest = re.search(r"digest=[^&]+", path)
            query = server.uploads[upload][0] + (f"&{digest[0]}" if digest else "")
            path = f"{path.partition('?')[0]}?{query}"
        answer = self.ask_upstream(method, path, body)
        location = answer[1].get("Location", "")
        if _upload_id(location) and answer[0] in {202, 204}:
            last = int(answer[1].get("Range", "0-0").partition("-")[2])
            server.uploads[_upload_id(location)] = (location.partition("?")[2], last + 1 if last else 0)
        return answer

    def ask_upstream(self, method: str, path: str, body: bytes) -> Answer:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {
            k: ", ".join(self.headers.get_all(k, [])) for k in self.headers if k.lower() != "connection"
        }
        if method == "PATCH":
            headers["Content-Length"] = str(len(body))
        try:
            upstream.request(method, path, body=body or None, headers=headers)
            response = upstream.getresponse()
            data = response.read()
            kept = {
                k: v for k, v in response.getheaders() if k.lower() not in {"transfer-encoding", "connection"}
            }
            return response.status, kept, data
        finally:
            upstream.close()

    def answer(self, answer: Answer, length: int, *, cut: int | None = None) -> None:
        status, headers, data = answer
        self.note(status, length)
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() != "content-length" or self.command == "HEAD":
                self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.reset(0, noted=True)

    def send_body(self, data: bytes) -> None:
        if self.server.slow_bytes_s is None:
            self.wfile.write(data)
            return
        for start in range(0, len(data), 1 << 18):
            self.wfile.write(data[start : start + (1 << 18)])
            time.sleep((1 << 18) / self.server.slow_bytes_s)

    def reset(self, length: int, *, noted: bool = False) -> None:
        """Close with RST, so that the client sees a reset and not an end."""
        if not noted:
            self.note(0, length)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def note(self, status: int, length: int) -> None:
        authorization = self.headers.get("Authorization", "")
        seen = Seen(
            self.command, self.path, length, status, authorization, self.headers.get("Content-Range", "")
        )
        with self.server.lock:
            self.server.seen.append(seen)

    def log_message(self, *args: object) -> None:
        """The tests read `seen` instead."""


def _upload_id(path: str) -> str:
    found = re.search(r"/blobs/uploads/([^/?]+)", path)
    return found[1] if found else ""
