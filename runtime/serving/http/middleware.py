"""What every request passes before its route: id, origin, API key, admission, size and time of the body.

Plain ASGI, because a body must be refused while it arrives, or before. Knows paths only as "open" or
not; does not know routes, models or the engine. Start at `RequestMiddleware.__call__`.
"""

import base64
import binascii
import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import ClientGoneError, ContentCodingError, RequestError
from runtime.serving.http.departure import Departure
from runtime.serving.http.origins import FORGEABLE, Callers, OriginMiddleware, may_be_forged, may_use_password
from runtime.serving.http.pages import ASSET_PATHS
from runtime.serving.http.refusals import Refusals, ends
from runtime.serving.http.sse import error_object, failure_reply, reply
from runtime.serving.http.uploads import CODINGS, Uploads
from runtime.serving.keys import KeyHolder
from runtime.serving.lifecycle import Lifecycle
from runtime.serving.settings import Limits
from runtime.serving.tokenizing import CALLER, Caller

OPEN_PATHS = frozenset(
    {"/livez", "/readyz", "/health", "/healthz", "/ping", "/v2/health/live", "/v2/health/ready", "/metrics"}
)
"""Answered without the key: probes and scrapers have none."""

DESCRIPTION_PATHS = frozenset({"/docs", "/openapi.json"})
"""Read without the key: they say how to send it, and nothing of this server's model."""
KEYLESS_PATHS = OPEN_PATHS | DESCRIPTION_PATHS | ASSET_PATHS
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Answered with the key of an administrator only: what they do, all others see."""

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
        callers: Callers,
        refusals: Refusals,
    ) -> None:
        self._app = app
        self._known_origin = OriginMiddleware(self._guarded, callers)
        self._lifecycle = lifecycle
        self._uploads = Uploads(limits)
        self._keys = callers.keys
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = plain_path(scope["path"])
        given = Headers(scope=scope).get("x-request-id", "")
        given = given if _ID.match(given) else ""
        request_id = f"{given}-{secrets.token_hex(3)}" if given else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        await self._known_origin(scope, receive, self._noting(scope, send, given or request_id))

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._of_known_origin(scope, receive, send)
        except Exception as failure:  # a bug of a route: answered as other refusals are
            self._refusals.unexpected(failure, scope)
            if "status" not in scope["state"]:
                failed = failure_reply(scope["path"], failure, scope["state"]["request_id"])
                await failed(scope, receive, send)
            # What has begun stays incomplete: the server then closes the connection, and the client knows.

    def _noting(self, scope: Scope, send: Send, request_id: str) -> Send:
        """Return a `send` that adds the request's id to the answer, and notes whether it is a refusal."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = scope["state"]["status"] = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode()), *_left(scope)],
                }
                if status >= 400 and scope["path"] not in OPEN_PATHS:
                    self._refusals.note(scope, status)
            await send(message)

        return noting

    async def _of_known_origin(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        if self._keys is not None and path not in KEYLESS_PATHS:
            holder = self._keys.holder(presented_key(headers) or "")
            if holder is None:
                await _unauthorized(path, headers)(scope, receive, send)
                return
            scope["state"]["holder"] = holder
            if path in ADMIN_PATHS and not holder.admin:
                message = f"the key '{holder.name}' may not do that: it has not 'admin: true'"
                await reply(path, 403, error_object(message, 403, code="admin_key_required"))(
                    scope, receive, send
                )
                return
        if scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            # The server sends no body to HEAD, whatever a route answers.
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self._app({**scope, "method": method}, receive, send)
        elif may_be_forged(headers):
            await reply(path, 403, error_object(FORGEABLE, 403, code="origin_unknown"))(scope, receive, send)
        elif not _JSON.match(headers.get("content-type", "application/json")):
            message = (
                f"content type '{headers['content-type'][:80]}' is not served here, send application/json"
            )
            await reply(path, 415, error_object(message, 415))(scope, receive, send)
        else:
            # curl -d declares a form. What it sends is JSON, or is refused as invalid JSON.
            MutableHeaders(scope=scope)["content-type"] = "application/json"
            await self._with_body(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._uploads.check(headers)
            if (budget := _holder(scope).budget) is not None:
                budget.take_request()
            self._lifecycle.admit()
            body = await self._uploads.read(headers, receive)
            scope["state"]["body_ends"] = ends(body)
            with self._lifecycle.in_flight():  # not before: a slow body must not count
                await self._answer(scope, Departure(body, receive), send)
        except ClientGoneError:
            return
        except RequestError as failure:  # from the body or admission: the app answers its own
            response = failure_reply(scope["path"], failure, scope["state"]["request_id"])
            if isinstance(failure, ContentCodingError):
                response.headers["Accept-Encoding"] = CODINGS
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, departure: Departure, send: Send) -> None:
        client, holder = scope.get("client") or ("",), _holder(scope)
        with ExitStack() as held:
            caller = CALLER.set(Caller(holder.name or client[0], departure.left, holder.budget, held))
            try:
                await self._app(scope, departure.receive, send)
            finally:
                CALLER.reset(caller)
                departure.close()


def plain_path(path: str) -> str:
    """Return `path` without doubled and trailing slashes, which base URLs that end in one bring in.

    They are not redirected: many clients send a redirected POST again as GET, or without its key. Line breaks
    at the end go too: a route's pattern matches before one, and what is checked here must be what is routed.
    """
    if not path.endswith(("/", "\n")) and "//" not in path:
        return path
    return re.sub("/{2,}", "/", path).rstrip("/\n") or "/"


def _holder(scope: Scope) -> KeyHolder:
    holder = scope["state"].get("holder")
    return holder if isinstance(holder, KeyHolder) else KeyHolder()


def _left(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the headers that say what is left of the limits of the request's key."""
    budget = _holder(scope).budget
    return [] if budget is None else budget.headers()


def presented_key(headers: Mapping[str, str]) -> str | None:
    """Return the key that a request carries: as a bearer token, `x-api-key`, or a browser's password.

    A browser adds a password by itself, also to requests of other sites' pages: those are refused.
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        if not may_use_password(headers):
            return None
        try:
            credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    elif scheme.lower() != "bearer":
        credentials = headers.get("x-api-key", "")  # as Anthropic's clients send it
    return credentials.strip() or None


def _unauthorized(path: str, headers: Mapping[str, str]) -> ASGIApp:
    message = "wrong or missing API key; send 'Authorization: Bearer KEY'"
    response = reply(path, 401, error_object(message, 401))
    if "text/html" in headers.get("accept", ""):
        # A browser then asks its user for it: any user name, the key as the password.
        response.headers["WWW-Authenticate"] = 'Basic realm="API key as password", charset="UTF-8"'
    return response
