"""How errors look to clients, how streams are sent, and how work ends when a client disconnects.

Knows HTTP and the error tree; does not know any route. Start at `failure_reply` and `EventStream`.
"""

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime import errors
from runtime.serving.http.refusals import ErrorReply

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_S = 1
PING_S = 15.0
"""A comment this often keeps proxies from closing a stream that still waits for its first token."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
"""For the routes' description: the content types without and with `stream`."""

DONE = b"data: [DONE]\n\n"
LINE_SEPARATORS = tuple((chr(code), f"\\u{code:04x}") for code in (0x85, 0x2028, 0x2029))

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    507: "server_error",
}
_ANTHROPIC_TYPES = {408: "timeout_error", 413: "request_too_large", 503: "overloaded_error"}
_CODES = {
    401: "invalid_api_key",
    413: "body_too_large",
    429: "rate_limit_exceeded",
    503: "unavailable",
    507: "out_of_memory",
}


def error_object(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object."""
    message = message.encode("utf-8", "replace").decode()
    param = param.encode("utf-8", "replace").decode() if param is not None else None
    kind = _TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}


def anthropic_error(error: dict[str, Any], status: int = 500) -> dict[str, Any]:
    """Return the error of Anthropic's routes, a body as well as an event; what OpenAI's has stays in it."""
    kind = _ANTHROPIC_TYPES.get(status) or error["type"].replace("server_error", "api_error")
    return {"type": "error", "error": {**error, "type": kind}}


def failure_object(failure: BaseException, request_id: str) -> tuple[int, dict[str, Any]]:
    """Return status and error object for `failure`; the text of an unexpected one is not shown."""
    if isinstance(failure, errors.Failure):
        status = errors.http_status(failure)
        param = failure.param if isinstance(failure, errors.RequestError) else None
        code = failure.code if isinstance(failure, errors.RequestError) else None
        return status, error_object(str(failure), status, param=param, code=code)
    return 500, error_object(f"internal error; the log of this server has it under request {request_id}", 500)


def reply(path: str, status: int, error: dict[str, Any]) -> ErrorReply:
    """Return an error in the form of the route: OpenAI's, outside /v1 with `detail` too, or Anthropic's."""
    headers = {}
    if status in {429, 503}:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in {408, 413}:
        headers["Connection"] = "close"
    if path.startswith("/v1/messages"):
        body = anthropic_error(error, status)
    elif path.startswith("/v1/"):
        body = {"error": error}
    else:
        body = {"detail": error["message"], "error": error}
    return ErrorReply(body, status, headers)


def failure_reply(path: str, failure: BaseException, request_id: str) -> ErrorReply:
    """Return the response to a request that failed with `failure`."""
    status, error = failure_object(failure, request_id)
    response = reply(path, status, error)
    if isinstance(failure, errors.RateLimitError):  # openai's clients read milliseconds, others whole seconds
        response.headers["Retry-After"] = str(math.ceil(failure.retry_after_s))
        response.headers["retry-after-ms"] = str(math.ceil(failure.retry_after_s * 1000))
    return response


def event(data: dict[str, Any], *, named: bool = False) -> bytes:
    """Return one server-sent event; `named` repeats its type in an `event:` line, as /v1/responses does."""
    name = f"event: {data['type']}\n".encode() if named else b""
    return name + b"data: " + _one_line_json(data) + b"\n\n"


def _one_line_json(data: dict[str, Any]) -> bytes:
    """Return `data` as JSON without any character at which some client ends a line.

    The standard knows CR and LF, which JSON escapes; Python's splitlines, which clients use, three more.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    if text.isascii():
        return text.encode()
    for character, escaped in LINE_SEPARATORS:
        text = text.replace(character, escaped)  # they stand in strings only
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's escape can carry
        return json.dumps(data, separators=(",", ":")).encode()


Failed = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Turns an error object into the events that report it."""


def _error_event(error: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"error": error}]


class EventStream(Response):
    """A stream of server-sent events; ends with [DONE], the events of an error, or the client's disconnect.

    `named` events carry their type in a line of its own, and no [DONE] ends them. `failed` returns the events
    that report an error; without it OpenAI's `{"error": …}` does.
    `events` is closed, and `close` called, within one event loop turn of the disconnect. A client that does
    not read is disconnected by http/write_watch.py; until then `send` waits, and no further event is made.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        *,
        close: Callable[[], None],
        request_id: str,
        named: bool = False,
        failed: Failed = _error_event,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Content-Type": "text/event-stream"}
        )
        self._events = events
        self._close = close
        self._request_id = request_id
        self._named = named
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as an ASGI response."""
        disconnected = asyncio.create_task(_wait_for_disconnect(receive))
        pending: asyncio.Task[dict[str, Any]] | None = None
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            while True:
                pending = pending or asyncio.create_task(_next(self._events))
                done, _ = await asyncio.wait(
                    (pending, disconnected), timeout=PING_S, return_when=asyncio.FIRST_COMPLETED
                )
                if disconnected in done:
                    log.info("Client of request %s went away", self._request_id)
                    return
                if pending not in done:
                    await _chunk(send, b": still working\n\n")
                    continue
                failure = pending.exception()
                if isinstance(failure, StopAsyncIteration):
                    break
                if failure is not None:  # the status is sent already: only an event can report it
                    last = self._failure_events(failure)
                    await _chunk(send, last, more=False)
                    return
                chunk = event(pending.result(), named=self._named)
                pending = None
                await _chunk(send, chunk)
            await _chunk(send, b"" if self._named else DONE, more=False)
        finally:
            disconnected.cancel()
            if pending is not None:
                pending.cancel()
                await asyncio.wait((pending,))
            await self._events.aclose()
            self._close()

    def _failure_events(self, failure: BaseException) -> bytes:
        """Log a failure that came after the answer had begun, and return the events that report it."""
        status, error = failure_object(failure, self._request_id)
        unexpected = None if isinstance(failure, errors.Failure) else failure
        level = logging.ERROR if unexpected else logging.WARNING if status >= 500 else logging.INFO
        message = "Request %s failed after its answer had begun: %s"
        log.log(level, message, self._request_id, error["message"], exc_info=unexpected)
        return b"".join(event(data, named=self._named) for data in self._failed(error))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], *, request_id: str) -> T:
    """Return what `work` returns; cancel it as soon as the client has gone (ASGI would let it run on)."""
    disconnected = asyncio.create_task(_wait_for_disconnect(request.receive))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            log.info("Client of request %s went away", request_id)
            raise errors.ClientGoneError("the client closed the connection")
        return task.result()
    finally:
        disconnected.cancel()
        task.cancel()
        await asyncio.wait((task, disconnected))


async def _next(events: AsyncIterator[T]) -> T:
    return await anext(events)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _chunk(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
