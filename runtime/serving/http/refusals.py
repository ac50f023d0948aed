"""The record of refused requests: counted in the metrics, and a log line each while they are few.

A client in a loop must not fill the disk, so past a burst the rest of a minute is one line of counts. A line
says route, status, code, model and request id; of a body only the model's name. `ErrorReply` notes what the
middleware, which sees only status and headers, cannot know. Start at `Refusals.note`.
"""

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

BURST = 20
"""Lines in one window, of refusals and of tracebacks each."""
WINDOW_S = 60.0
MODEL_WITHIN = 4096
"""Bytes at either end of a body in which the model's name is looked for."""

_MODEL = re.compile(rb'"model"\s*:\s*"([\w./:@+-]{1,128})"')


class ErrorReply(JSONResponse):
    """A refusal; says in the request's state which it is, and for which route."""

    def __init__(self, body: dict[str, Any], status: int, headers: dict[str, str]) -> None:
        super().__init__(body, status, headers)
        self._error = body["error"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        route = getattr(scope.get("route"), "path", None)
        scope.setdefault("state", {}).update(error=self._error, route=route)
        await super().__call__(scope, receive, send)


class Refusals:
    """Counts and logs refusals; one for a server, used on its event loop only."""

    def __init__(self, count: Callable[[int], None], *, window_s: float = WINDOW_S) -> None:
        self._count = count
        self._window_s = window_s
        self._began_s = -window_s
        self._logged: Counter[str] = Counter()
        self._unsaid: Counter[str] = Counter()

    def note(self, scope: Scope, status: int) -> None:
        """Count a refusal and log it, or count it for the line at the end of the minute."""
        self._count(status)
        state = scope["state"]
        error = state.get("error") or {}
        what = f"{status} {error.get('code') or ''}".strip()
        if not self._has_room("refusals"):
            if not self._unsaid:
                left_s = self._began_s + self._window_s - time.monotonic()
                asyncio.get_running_loop().call_later(max(0.0, left_s), self._say_counts)
            self._unsaid[what] += 1
            return
        route = state.get("route") or repr(scope["path"][:80])
        fields = {
            "route": route,
            "status": status,
            "code": error.get("code"),
            "model": _model(state.get("body_ends", ())),
            "request_id": state["request_id"],
        }
        why = f": {error['message']}" if error and status > 500 else ""  # what a 500 says, its traceback says
        log.log(
            logging.WARNING if status >= 500 else logging.INFO,
            "Refused %s %s: %s, model %s, request %s%s",
            *(scope["method"], route, what, fields["model"] or "-", state["request_id"], why),
            extra={"fields": fields},
        )

    def unexpected(self, failure: Exception, scope: Scope) -> None:
        """Log the traceback of a failure that is our own fault."""
        if self._has_room("tracebacks"):
            log.error("Request %s failed", scope["state"]["request_id"], exc_info=failure)

    def _has_room(self, kind: str) -> bool:
        now_s = time.monotonic()
        if now_s - self._began_s >= self._window_s:
            self._began_s = now_s
            self._logged.clear()
        self._logged[kind] += 1
        return self._logged[kind] <= BURST

    def _say_counts(self) -> None:
        counts = ", ".join(f"{count} times {what}" for what, count in self._unsaid.most_common())
        log.warning("Refused %s more requests within %g s: %s", self._unsaid.total(), self._window_s, counts)
        self._unsaid.clear()


def ends(body: bytes) -> tuple[bytes, bytes]:
    """Return what is kept of a body for `Refusals.note`: where clients write the model's name."""
    return body[:MODEL_WITHIN], body[-MODEL_WITHIN:]


def _model(ends_of_body: Iterable[bytes]) -> str | None:
    """Return the model that a body asks for, where its name can stand in a log line."""
    found = next(filter(None, map(_MODEL.search, ends_of_body)), None)
    return found[1].decode("ascii", "replace") if found else None
