"""What every request passes before its route: request id, API key, admission, size and time of the body.

Plain ASGI, because a body must be refused while it arrives, or before. Knows paths only as "open" or
not; does not know routes, models or the engine. Start at `RequestMiddleware.__call__`.
"""

import asyncio
import base64
import binascii
import contextlib
import re
import secrets
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import ClientGoneError, DeadlineError, RequestError, TooLargeError
from runtime.serving.http.sse import error_object, failure_reply, reply
from runtime.serving.lifecycle import Lifecycle
from runtime.serving.settings import Limits

OPEN_PATHS = frozenset(
    {"/livez", "/readyz", "/health", "/healthz", "/ping", "/v2/health/live", "/v2/health/ready", "/metrics"}
)
"""Answered without the key: probes and scrapers have none."""

SMALL_BYTES = 64 << 10
LINGER_S = 5.0
"""How long the rest of a refused body is read and dropped, so that the client reads the answer."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}$")
_JSON = re.compile(
    r"(application/(?:[\w.-]+\+)?json|application/x-www-form-urlencoded|text/plain)\s*(?:;|$)", re.IGNORECASE
)


class RequestMiddleware:
    """Wraps an app: request id, API key, body limit, body deadline, body type."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        lifecycle: Lifecycle,
        limits: Limits,
        api_key: str | None = None,
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._body_bytes = limits.body_bytes
        self._body_timeout_s = limits.body_timeout_s
        self._api_key = api_key
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        given = given if _ID.match(given) else ""
        request_id = f"{given}-{secrets.token_hex(3)}" if given else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        send = _with_id(send, given or request_id)
        path = scope["path"]
        if self._api_key is not None and path not in OPEN_PATHS and not authorized(headers, self._api_key):
            self._count(401)
            await _unauthorized(path, headers)(scope, receive, send)
        elif scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            await self._app(scope, receive, send)
        elif not _JSON.match(headers.get("content-type", "application/json")):
            self._count(415)
            message = (
                f"content type '{headers['content-type'][:80]}' is not served here, send application/json"
            )
            await reply(path, 415, error_object(message, 415))(scope, receive, send)
        else:
            # curl -d declares a form. What it sends is JSON, or is refused as invalid JSON.
            MutableHeaders(scope=scope)["content-type"] = "application/json"
            await self._with_body(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._lifecycle.admit()
            body = await self._read(Headers(scope=scope), receive)
            with self._lifecycle.in_flight():  # not before: a slow body must not count
                await self._app(scope, _replay(body, receive), send)
        except ClientGoneError:
            return
        except RequestError as failure:  # from the body or admission: the app answers its own
            response = failure_reply(scope["path"], failure, scope["state"]["request_id"])
            self._count(response.status_code)
            await _linger(response, receive, scope, send)

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        too_large = TooLargeError(f"the body is larger than the {self._body_bytes} bytes this server accepts")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError("the client closed the connection within its request")
                    body += message.get("body", b"")
                    if len(body) > self._body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise DeadlineError(f"the body was not complete after {self._body_timeout_s:.0f} s") from None


def authorized(headers: Mapping[str, str], api_key: str) -> bool:
    """Return whether the request carries the key: as a bearer token, or as a browser's password.

    A browser adds a password by itself, also to requests of other sites' pages: those are refused.
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        if headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
            return False
        try:
            credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return secrets.compare_digest(credentials.strip().encode(), api_key.encode())


def _unauthorized(path: str, headers: Mapping[str, str]) -> ASGIApp:
    message = "wrong or missing API key; send 'Authorization: Bearer KEY'"
    response = reply(path, 401, error_object(message, 401))
    if "text/html" in headers.get("accept", ""):
        # A browser then asks its user for it: any user name, the key as the password.
        response.headers["WWW-Authenticate"] = 'Basic realm="API key as password", charset="UTF-8"'
    return response


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first gives the body read before, then the messages after it."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_id(send: Send, request_id: str) -> Send:
    async def with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
        await send(message)

    return with_id


async def _linger(response: JSONResponse, receive: Receive, scope: Scope, send: Send) -> None:
    """Answer a request whose body has not arrived in full, and drop the rest of it.

    Closing at once would reset the connection while the client is still sending, and it would never read
    the answer. A small body is dropped first: it has arrived already, and the connection can be kept.
    """
    length = Headers(scope=scope).get("content-length", "")
    if response.status_code == 408 or (length.isdecimal() and int(length) <= SMALL_BYTES):
        if response.status_code != 408:  # that client has stopped sending
            await _drop(receive)
        await response(scope, receive, send)
        return
    head = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "http.response.start", **head})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    await _drop(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass
