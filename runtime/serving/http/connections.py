"""One connection: HTTP/1.1 as it comes in, within limits, up to the request that the app answers.

httptools parses, uvicorn's RequestResponseCycle speaks ASGI. Between them stand the limits on headers,
framing and pipelining, the time limits, and what common clients need: an offer of HTTP/2 is passed over,
HTTP/1.0 gets no chunks, and every refusal is OpenAI's object. Does not know routes, keys or what a body
means; acceptor.py decides which connections are open. Start at `Connection.data_received`.
"""

import asyncio
import logging
import re
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from runtime.errors import one_line
from runtime.logs import Repeated
from runtime.serving.http.acceptor import Acceptable, OpenConnections
from runtime.serving.http.host_field import with_certain_host
from runtime.serving.http.middleware import OPEN_PATHS, plain_path
from runtime.serving.http.sse import error_object, reply
from runtime.serving.http.write_watch import WriteWatch
from runtime.serving.lifecycle import STOPPING
from runtime.serving.settings import Limits

if TYPE_CHECKING:
    from uvicorn._types import HTTPScope

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75.0
"""Longer than load balancers keep idle connections (60 s), so that they close first."""
RESERVED_TIMEOUT_S = 1.0
"""To the end of the headers of a reserved connection: probes send theirs at once."""
PIPELINED = 8
"""Requests that may wait for the answer before them; browsers and SDKs send none so."""
SMALL_BYTES = 64 << 10
"""So much of a refused body is read to keep its connection; for more it is closed."""
LINGER_S = 5.0
"""How long a refused client may go on sending before a reset, which at once would take the answer from it."""
LINGER_BYTES = 16 << 20


class _Refusal(Exception):
    """Ends the parsing of a connection with an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Exchange(RequestResponseCycle):
    """One request and its answer, as ASGI; leaves the closing of the connection to the connection."""

    ends_connection = False
    """Whether the answer told the client that the connection is closed after it."""
    _until_close = False

    async def send(self, message: Any) -> None:
        """Send a part of the answer."""
        if message["type"] != "http.response.start":
            if self._until_close:
                self.expected_content_length = len(message.get("body", b""))
            await super().send(message)
            return
        if self.more_body and not self._rest_is_small():
            self.keep_alive = False
        if self.scope["http_version"] != "1.1" and not any(
            name.lower() == b"content-length" for name, _ in message["headers"]
        ):
            self._until_close = True
            self.chunked_encoding = False
        await super().send(message)
        self.ends_connection, self.keep_alive = not self.keep_alive, True

    async def send_500_response(self) -> None:
        """Answer a request that the app failed to answer."""
        request_id = self.scope.get("state", {}).get("request_id", secrets.token_hex(8))
        error = error_object(f"internal error; the log of this server has it under request {request_id}", 500)
        response = reply(self.scope["path"], 500, error)
        headers = [*response.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})

    def leave(self) -> None:
        """Tell the app that the client has gone."""
        self.disconnected = True
        self.message_event.set()

    def _rest_is_small(self) -> bool:
        if self.waiting_for_100_continue:  # the client may or may not send it
            return False
        length = dict(self.scope["headers"]).get(b"content-length", b"")
        return length.isdigit() and int(length) <= SMALL_BYTES


@dataclass(frozen=True, slots=True)
class Shared:
    """What the connections of a server share."""

    config: Config
    state: ServerState
    """uvicorn's: the connections and requests that it waits for when it stops, and the date."""
    limits: Limits
    connections: OpenConnections
    count: Callable[[int], None]
    """Counts a refusal by its status."""
    log_refusal: Repeated = field(default_factory=lambda: Repeated(log))


class Connection(Acceptable):
    """One client's connection and the requests on it, answered one after another."""

    def __init__(self, shared: Shared, *, reserved: bool) -> None:
        self._shared = shared
        self._limits = shared.limits
        self.reserved = reserved
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._made = False
        self._clock: asyncio.TimerHandle | None = None
        self._idle = False
        self._closing = False
        self._deaf_bytes: int | None = None
        """Bytes dropped since nothing more is parsed; None while it is."""
        self._answering: Exchange | None = None
        self._receiving: Exchange | None = None
        self._pipeline: deque[Exchange] = deque()
        self._parser = self._new_parser()
        self._raw_head_bytes = 0
        self.on_message_begin()

    # The connection: asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock."""
        self._transport = cast(asyncio.Transport, transport)
        self._made = True
        self._flow = FlowControl(self._transport)
        self._writes = WriteWatch(
            self._transport, stall_s=self._limits.write_timeout_s, timeout_s=self._limits.request_timeout_s
        )
        self._client = get_remote_addr(self._transport)
        self._server = get_local_addr(self._transport)
        self._shared.state.connections.add(self)  # type: ignore[arg-type]
        self._start_clock(RESERVED_TIMEOUT_S if self.reserved else self._limits.header_timeout_s)
        if self._closing:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the requests that are not answered."""
        self._shared.state.connections.discard(self)
        self._shared.connections.closed(self)
        self._stop_clock()
        self._writes.closed()
        for exchange in (self._answering, self._receiving, *self._pipeline):
            if exchange is not None:
                exchange.leave()
        self._pipeline.clear()
        self._flow.resume_writing()

    def pause_writing(self) -> None:
        """Hold answers back while the client does not read."""
        self._flow.pause_writing()
        self._writes.paused()

    def resume_writing(self) -> None:
        """Go on."""
        self._flow.resume_writing()
        self._writes.resumed()

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no HTTP/1.1, or beyond a limit, ends the connection with an answer."""
        if self._deaf_bytes is not None:
            self._drop(len(data))
            return
        if self._idle:
            self._idle = False
            self._start_clock(RESERVED_TIMEOUT_S if self.reserved else self._limits.header_timeout_s)
        try:
            self._feed(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._pass_over_upgrade(data[self._fed_bytes + upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._end(cause if isinstance(cause, _Refusal) else _Refusal(400, _not_http(cause)))
        except httptools.HttpParserError as error:
            self._end(_Refusal(400, _what_is_spoken(data) or _not_http(error)))
        except _Refusal as refusal:
            self._end(refusal)

    def close(self) -> None:
        """Close it, once what was written is sent."""
        self._closing = True
        self._stop_clock()
        if self._made:
            self._transport.close()

    def shutdown(self) -> None:
        """Close it now, or after the answer being made; a request that still arrives is refused."""
        exchange = self._answering
        if exchange is None:
            if self._deaf_bytes is None:  # else it was refused, and closes once the client has read why
                self.close()
        elif exchange.response_started:
            exchange.ends_connection = True
        elif exchange.more_body:
            self._end(_Refusal(503, STOPPING))
        else:
            exchange.keep_alive = False

    def cut_off(self) -> None:
        """Close it with what was written and not read, so that what is made of its request ends."""
        self._transport.abort()

    # What data_received does.

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # A client may announce that it closes after a request, and go on: the answer comes first.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _feed(self, data: bytes) -> None:
        self._fed_bytes = 0
        if not self._in_head:
            self._wire_bytes += len(data)
            self._parser.feed_data(data)
            # Chunks of a byte each, endless extensions of chunks and trailers cost time and say nothing.
            if self._wire_bytes > SMALL_BYTES + self._body_bytes + self._body_bytes // 4:
                raise _Refusal(
                    400, "the framing of the body's chunks takes more than the body: send larger chunks"
                )
            return
        self._feed_head(data)

    def _feed_head(self, data: bytes) -> None:
        room = self._limits.header_bytes + 1 - self._raw_head_bytes
        self._raw_head_bytes += len(data)
        if len(data) <= room:
            self._parser.feed_data(data)
            return
        with memoryview(data) as view:
            self._parser.feed_data(view[:room])
            if self._in_head:
                raise self._head_too_large()
            self._fed_bytes = room
            self._parser.feed_data(view[room:])

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """Parse a request again without its offer to change the protocol, which the parser stopped at.

        Java's HttpClient offers h2c with every first request, and sends the body all the same.
        """
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._end(_Refusal(400, "CONNECT is not served here: this is no proxy"))
            return
        version = self._parser.get_http_version().encode()
        fields = [name + b": " + value + b"\r\n" for name, value in self._headers if name != b"upgrade"]
        head = b"".join([method, b" ", self._url, b" HTTP/", version, b"\r\n", *fields, b"\r\n"])
        self._parser = self._new_parser()
        self.data_received(head + rest)

    def _end(self, refusal: _Refusal) -> None:
        """Answer with a refusal where no other answer has begun, and close the connection after it."""
        if self._pipeline and self._receiving is not None and self._receiving.more_body:
            self._pipeline.pop()
        last = self._pipeline[-1] if self._pipeline else self._answering
        if last is None:
            self._refuse(refusal)
        elif last.more_body and not last.response_started:
            last.leave()
            self._answering = None
            self._refuse(refusal)
        else:  # what follows a whole request was wrong: that one is answered
            last.keep_alive, last.ends_connection = False, True
            self._deaf_bytes = 0

    def _refuse(self, refusal: _Refusal) -> None:
        self._shared.count(refusal.status)
        self._shared.log_refusal(
            logging.WARNING, "Refused a request of %s: %s", self._client[0] if self._client else "-", refusal
        )
        path = self._url.decode("ascii", "replace").partition("?")[0]
        response = reply(path, refusal.status, error_object(str(refusal), refusal.status))
        fields = [
            *self._shared.state.default_headers,
            *(field for field in response.raw_headers if field[0] != b"connection"),
            (b"x-request-id", secrets.token_hex(8).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join([name + b": " + value + b"\r\n" for name, value in fields])
        self._transport.write(STATUS_LINE[refusal.status] + head + b"\r\n" + bytes(response.body))
        self._linger()

    def _linger(self) -> None:
        """Close the connection, after the client has had time to stop sending and read the answer."""
        self._deaf_bytes = 0
        self._flow.resume_reading()
        if self._transport.is_closing():
            return
        self._transport.write_eof()
        self._start_clock(RESERVED_TIMEOUT_S if self.reserved else LINGER_S)
        self._shared.connections.waits(self)

    def _drop(self, size: int) -> None:
        self._deaf_bytes = (self._deaf_bytes or 0) + size
        if self._deaf_bytes > LINGER_BYTES:
            self.close()

    # One request: the parser calls these.

    def on_message_begin(self) -> None:
        """Make ready for a request's head."""
        if len(self._pipeline) >= PIPELINED:
            raise _Refusal(400, f"more than {PIPELINED} requests wait on this connection for their answers")
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._in_head = True
        self._expects = False
        self._head_bytes = self._fields = 0
        self._wire_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; those after a body are dropped, since the request was judged by the others."""
        self._fields += 1
        self._count_head(len(name) + len(value) + 4)
        if not self._in_head:
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects = True
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            raise _Refusal(501, "bodies with another Transfer-Encoding than chunked are not read here")
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin to answer a request, or let it wait for the answer to the one before."""
        self._in_head = False
        self._raw_head_bytes = 0
        if self._parser.should_upgrade():
            return  # the parser stops here, and data_received goes on without the offer
        self._check_host()
        scope = self._scope()
        if self.reserved and plain_path(scope["path"]) not in OPEN_PATHS:
            raise _Refusal(503, "too many connections are open; try again shortly")
        version = scope["http_version"]
        exchange = Exchange(
            scope=scope,
            transport=self._transport,
            flow=self._flow,
            logger=log,
            access_logger=log,
            access_log=False,
            default_headers=self._shared.state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self._expects and version == "1.1",
            keep_alive=version == "1.1" and not self.reserved and self._parser.should_keep_alive(),
            on_response=self._on_response,
        )
        self._receiving = exchange
        if self._answering is None:
            self._stop_clock()
            self._shared.connections.works(self)
            self._answer(exchange)
        else:
            self._flow.pause_reading()
            self._pipeline.append(exchange)

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body on; the client waits while the app does not take it."""
        self._body_bytes += len(body)
        exchange = self._receiving
        if exchange is None or exchange.response_complete:
            return
        exchange.body += body
        if len(exchange.body) > HIGH_WATER_LIMIT:
            self._flow.pause_reading()
        exchange.message_event.set()

    def on_message_complete(self) -> None:
        """Tell the app that the request is whole."""
        exchange = self._receiving
        if exchange is None:
            return
        exchange.more_body = False
        exchange.message_event.set()
        if self._answering is None and exchange.response_complete:
            self._rest()

    def _scope(self) -> "HTTPScope":
        url = httptools.parse_url(self._url)
        raw_path = url.path or b"/"
        path = raw_path.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": self._shared.config.asgi_version, "spec_version": "2.3"},
            "http_version": self._parser.get_http_version(),
            "server": self._server,
            "client": self._client,
            "scheme": "http",
            "root_path": "",
            "headers": self._headers,
            "state": {},
            "method": self._parser.get_method().decode("ascii"),
            "path": "/" if path == "*" else unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
        }

    def _check_host(self) -> None:
        version = self._parser.get_http_version()
        if version == "2.0":  # the parser lets it through
            raise _Refusal(505, "HTTP/2.0 is not spoken here: send HTTP/1.1")
        try:
            self._headers = with_certain_host(self._headers, self._url, version)
        except ValueError as fault:
            raise _Refusal(400, str(fault)) from None

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.header_bytes:
            raise self._head_too_large()
        if self._fields > self._limits.header_fields:
            raise _Refusal(431, f"the request has more than {self._limits.header_fields} header fields")

    def _head_too_large(self) -> _Refusal:
        return _Refusal(431, f"the request's headers are larger than {self._limits.header_bytes} bytes")

    # Its answer.

    def _answer(self, exchange: Exchange) -> None:
        self._answering = exchange
        self._writes.request()
        task = self._loop.create_task(exchange.run_asgi(self._shared.config.loaded_app))
        self._shared.state.tasks.add(task)
        task.add_done_callback(self._shared.state.tasks.discard)

    def _on_response(self) -> None:
        """Go on after a whole answer."""
        exchange, self._answering = self._answering, None
        if exchange is None or self._transport.is_closing():
            return
        if exchange.ends_connection and not exchange.more_body:
            self.close()
        elif exchange.ends_connection:
            self._linger()
        elif self._pipeline:
            self._answer(self._pipeline.popleft())
        else:
            self._flow.resume_reading()
            self._shared.connections.waits(self)
            if exchange.more_body:
                self._start_clock(self._limits.header_timeout_s)
            else:
                self._rest()

    def _rest(self) -> None:
        self._idle = self._in_head = True
        self._start_clock(KEEP_ALIVE_S)

    # Time.

    def _start_clock(self, seconds: float) -> None:
        self._stop_clock()
        self._clock = self._loop.call_later(seconds, self.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


def _not_http(error: object) -> str:
    return f"not a valid HTTP/1.1 request: {one_line(error)}"


def _what_is_spoken(data: bytes) -> str | None:
    """Return what to say to clients that speak another protocol, by what they sent first."""
    if re.match(rb"\x16\x03[\x00-\x04]", data):
        return "this port speaks http, not https: use http:// in the URL, or put a proxy with TLS in front"
    if data.startswith(b"PRI * HTTP/2"):
        return "HTTP/2 is not spoken here: send HTTP/1.1"
    return None
