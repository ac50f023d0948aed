"""A raw-socket HTTP server for data files that misbehaves on request.

Each path has a list of `Reply`s, used one after another, the last one for ever. Knows just enough HTTP to
break it; does not know what the files hold. Start at `DatasetServer`.
"""

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer to one request."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = -1
    """Content-Length to claim: -1 the true one, None no header at all."""
    cut: int | None = None
    """Close the connection after so many bytes of the body."""
    drip_s: float = 0.0
    """Seconds between single bytes of the body."""
    silent_s: float = 0.0
    """Seconds of silence after the headers."""
    ranges: bool = True
    """Answer a Range with 206 and the rest; otherwise with 200 and everything."""
    etag: str = '"one"'
    endless: bool = False
    """Send the body again and again, as long as somebody reads."""


class DatasetServer:
    """Listens on a free loopback port from `with` on."""

    def __init__(self, replies: dict[str, Sequence[Reply]]) -> None:
        self.replies = {path: list(sequence) for path, sequence in replies.items()}
        self.requests: dict[str, list[dict[str, str]]] = defaultdict(list)
        """Headers (lower-case names) of every request, by path without its query."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    received = connection.recv(65536)
                    if not received:
                        return
                    head += received
                self._answer(connection, head.decode("latin-1"))
            except OSError:
                return

    def _answer(self, connection: socket.socket, head: str) -> None:
        first, *lines = head.split("\r\n")
        path = first.split()[1].partition("?")[0]
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }
        with self._lock:
            self.requests[path].append(headers)
            sequence = self.replies.get(path, [Reply(status=404)])
            reply = sequence.pop(0) if len(sequence) > 1 else sequence[0]
        status, body, extra = reply.status, reply.body, dict(reply.headers)
        wanted = headers.get("range")
        fresh = headers.get("if-range") == reply.etag
        if wanted and status == 200 and reply.ranges and fresh:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            extra.setdefault("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            status, body = 206, body[start:]
        length = len(body) if reply.length == -1 else reply.length
        if length is not None:
            extra["Content-Length"] = str(length)
        extra.setdefault("ETag", reply.etag)
        extra.setdefault("Connection", "close")
        text = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
        connection.sendall(f"HTTP/1.1 {status} X\r\n{text}\r\n".encode("latin-1"))
        if self._stopping.wait(reply.silent_s):
            return
        if reply.drip_s:
            for byte in body:
                connection.sendall(bytes([byte]))
                if self._stopping.wait(reply.drip_s):
                    return
        while reply.endless:
            connection.sendall(body)
        connection.sendall(body if reply.cut is None else body[: reply.cut])
        if reply.cut is not None:
            time.sleep(0.02)  # let the bytes arrive before the reset
