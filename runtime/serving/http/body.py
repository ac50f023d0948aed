"""The way of every request's body: bytes, one parse, limits, leniency, validation, a typed body.

A route takes it by being of a router with `route_class=BodyRoute`; FastAPI's own reading of bodies is not
used, and describes them in /openapi.json only. Parsing is json_parser.py's, leniency body_types.py's and
messages.py's, the wording of errors body_errors.py's. Knows no route. Start at `BodyRoute`.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.responses import Response

from runtime.errors import RequestError
from runtime.serving.http.body_errors import refusal, shown
from runtime.serving.http.body_types import Body
from runtime.serving.http.constraint_fields import RELAXED, relaxed_header
from runtime.serving.http.fields import UnknownFields
from runtime.serving.http.json_parser import parse

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)

INLINE_BYTES = 64 << 10
"""Bodies up to this size are read on the event loop: a few milliseconds at most."""

IGNORED = "x-ignored-fields"
"""The header of an answer that lists the fields that had no effect because nothing knows them."""

MOST_LOGGED = 256
"""Unknown names that are logged in the life of a server, each once."""

_logged: set[str] = set()


class BodyRoute(APIRoute):
    """A route whose endpoint is given its `body` by `read`, and the `request` where it asks for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        endpoint = self.endpoint
        hints = get_type_hints(endpoint)
        body_type = hints.get("body")
        if body_type is None:
            return super().get_route_handler()
        with_request = "request" in hints

        async def handle(request: Request) -> Response:
            unknown = UnknownFields()
            given: dict[str, Any] = {"body": await read(await request.body(), body_type, unknown)}
            if with_request:
                given["request"] = request
            response: Response = await endpoint(**given)
            if (relaxed := relaxed_header(request)) is not None:
                response.headers[RELAXED] = relaxed
            if unknown.names:
                _log_once(request.url.path, unknown)
                response.headers[IGNORED] = unknown.listed()
            return response

        return handle


async def read(sent: bytes, body_type: type[B], unknown: UnknownFields) -> B:
    """Return the body that `sent` is; a large one is read in a thread. Raises RequestError."""
    if len(sent) <= INLINE_BYTES:
        return read_now(sent, body_type, unknown)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_thread(), read_now, sent, body_type, unknown)


def read_now(sent: bytes, body_type: type[B], unknown: UnknownFields) -> B:
    """Return the body that `sent` is, and note in `unknown` the names that nothing knows."""
    value = parse(sent)
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {shown(value)}")
    try:
        return body_type.model_validate(value, context=unknown)
    except ValidationError as error:
        raise refusal(error) from None


@cache
def _thread() -> ThreadPoolExecutor:
    """Return the one thread for large bodies: several would share the interpreter with the event loop."""
    return ThreadPoolExecutor(1, thread_name_prefix="body")


def _log_once(path: str, unknown: UnknownFields) -> None:
    for name in unknown.names:
        if name not in _logged and len(_logged) < MOST_LOGGED:
            _logged.add(name)
            log.info("The field '%s' of a request to %s is not known and had no effect", name, path)
