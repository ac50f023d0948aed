"""How failures look to clients, how streams are sent, and what ends when a client goes away.

Knows HTTP and the error tree; does not know any route. Start at `failure_reply` and `EventStream`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from runtime import errors

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_S = 1
PING_S = 15.0
"""A comment this often keeps proxies from closing a stream whose first token is not there yet."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
"""For the routes' description: what answers a request with and without `stream`."""

DONE = b"data: [DONE]\n\n"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
}
_CODES = {401: "invalid_api_key", 413: "body_too_large", 429: "rate_limit_exceeded", 503: "unavailable"}


def error_object(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object."""
    message = message.encode("utf-8", "replace").decode()
    param = param.encode("utf-8", "replace").decode() if param is not None else None
    kind = _TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}


def failure_object(failure: BaseException, request_id: str) -> tuple[int, dict[str, Any]]:
    """Return status and error object for `failure`; what nobody foresaw is logged and not shown."""
    if isinstance(failure, errors.Failure):
        status = errors.http_status(failure)
        param = failure.param if isinstance(failure, errors.RequestError) else None
        code = failure.code if isinstance(failure, errors.RequestError) else None
        if status >= 500:
            log.warning("Request %s: %s", request_id, failure)
        return status, error_object(str(failure), status, param=param, code=code)
    log.error("Request %s failed", request_id, exc_info=failure)
    return 500, error_object(f"internal error; the log of this server has it under request {request_id}", 500)


def reply(path: str, status: int, error: dict[str, Any]) -> JSONResponse:
    """Return an error response: OpenAI's body, and `detail` beside it where older clients read that."""
    headers = {}
    if status in {429, 503}:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in {408, 413}:
        headers["Connection"] = "close"
    body = {"error": error} if path.startswith("/v1/") else {"detail": error["message"], "error": error}
    return JSONResponse(body, status, headers)


def failure_reply(path: str, failure: BaseException, request_id: str) -> JSONResponse:
    """Return the response to a request that failed with `failure`."""
    status, error = failure_object(failure, request_id)
    return reply(path, status, error)


def event(data: dict[str, Any], *, named: bool = False) -> bytes:
    """Return one server-sent event; `named` repeats its type in a line of its own, as /v1/responses does."""
    name = f"event: {data['type']}\n".encode() if named else b""
    return name + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of server-sent events that ends with [DONE], an error event, or the client's going.

    `named` events carry their type in a line of its own, and no [DONE] ends them.
    `events` is closed, and `close` called, within one event loop turn of the client going away.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        *,
        close: Callable[[], None],
        request_id: str,
        named: bool = False,
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as an ASGI response."""
        gone = asyncio.create_task(_disconnected(receive))
        following: asyncio.Task[dict[str, Any]] | None = None
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            while True:
                following = following or asyncio.create_task(_next(self._events))
                done, _ = await asyncio.wait(
                    (following, gone), timeout=PING_S, return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    log.info("Client of request %s went away", self._request_id)
                    return
                if following not in done:
                    await _chunk(send, b": still working\n\n")
                    continue
                failure = following.exception()
                if isinstance(failure, StopAsyncIteration):
                    break
                if failure is not None:  # the status is sent: an event is the only way left to say it
                    error = failure_object(failure, self._request_id)[1]
                    fields = {**error, "type": "error"} if self._named else {"error": error}
                    await _chunk(send, event(fields, named=self._named), more=False)
                    return
                chunk = event(following.result(), named=self._named)
                following = None
                await _chunk(send, chunk)
            await _chunk(send, b"" if self._named else DONE, more=False)
        finally:
            gone.cancel()
            if following is not None:
                following.cancel()
                await asyncio.wait((following,))
            await self._events.aclose()
            self._close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], *, request_id: str) -> T:
    """Return what `work` returns; cancel it as soon as the client has gone (ASGI would let it run on)."""
    gone = asyncio.create_task(_disconnected(request.receive))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            log.info("Client of request %s went away", request_id)
            raise errors.ClientGoneError("the client closed the connection")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait((task, gone))


async def _next(events: AsyncIterator[T]) -> T:
    return await anext(events)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _chunk(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
