"""Which web pages may call this server, and which names it answers to.

A browser sends a page's request wherever the page says, with the password that its user has stored for the
server. What tells the requests of other sites' pages apart are headers that no page can set: `Origin`,
`Host` and `Sec-Fetch-Site`, which is absent on plain http. Clients that are no browsers send neither the
first nor the last. Does not know routes. Start at `Callers.refusal`.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.serving.http.body import IGNORED
from runtime.serving.http.constraint_fields import RELAXED
from runtime.serving.http.sse import error_object, reply
from runtime.serving.keys import KeyRing

EVERY = "*"
"""As an allowed origin or host: all of them."""
OWN_NAMES = frozenset({"host.docker.internal", "host.containers.internal"})
"""How containers call the machine that they run on; nobody else can register these."""
READING = frozenset({"GET", "HEAD"})
"""Methods that change nothing here."""
FORGEABLE = (
    "a form or plain text with a password or cookies is not served, since any page can make a browser send "
    "one; send Content-Type: application/json, or the key as Authorization: Bearer KEY"
)
"""What a client is told whose request `may_be_forged`."""
RATE_HEADERS = tuple(
    f"x-ratelimit-{name}-{unit}"
    for unit in ("requests", "tokens")
    for name in ("limit", "remaining", "reset")
)
"""What a key with limits has left; see `Budget.headers`."""
PREFLIGHT_S = 600
"""How long browsers remember an answer to a preflight request."""


@dataclass(frozen=True, slots=True)
class Callers:
    """Who may call, as the server was started."""

    keys: KeyRing | None = None
    """The keys of which they must send one; None is nothing."""
    origins: frozenset[str] = frozenset()
    """Those of other sites' pages that may call; `*` is all."""
    hosts: frozenset[str] | None = None
    """Names in `Host` beside addresses; None is all."""

    def refusal(self, method: str, headers: Mapping[str, str]) -> tuple[str, str] | None:
        """Return (code, message) where a request must not be served, else None."""
        host = headers.get("host", "")
        if self.hosts is not None and not _is_known(host, self.hosts):
            name = repr(_name(host)[:100])
            return "host_not_allowed", f"this server is not known as {name}; allow the name with --allow-host"
        if method in READING:
            return None
        if is_foreign(headers) and not self._allows(headers.get("origin")):
            page = repr(headers.get("origin", "another site")[:100])
            return "origin_not_allowed", (
                f"pages of {page} may not call this server; allow the origin with --allow-origin"
            )
        return None

    def _allows(self, origin: str | None) -> bool:
        return EVERY in self.origins or origin in self.origins


def known_hosts(bound: str, address: str, more: Iterable[str]) -> frozenset[str] | None:
    """Return the names that a server at `address`, configured as `bound`, answers to; None is every name.

    One that only this machine reaches has no other names than its own: a page whose name someone pointed at
    this machine (DNS rebinding) would count as the server's own page. One that others reach cannot know
    its names: services, ingresses and port mappings choose them.
    """
    hosts = frozenset(map(str.lower, more))
    if EVERY in hosts or not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return None
    return OWN_NAMES | hosts | {bound.lower()}


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Return whether a browser sent a request for another origin's page."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin == "null":  # of a file, a sandboxed frame, or a redirect between sites
        return True
    if site == "same-origin":  # a proxy may have changed the Host since
        return False
    if site is not None and site != "none":
        return True
    return origin is not None and not _is_at(origin, headers.get("host", ""))


def may_use_password(headers: Mapping[str, str]) -> bool:
    """Return whether a browser's stored password counts: for the server's own pages, and links to them."""
    return not is_foreign(headers) or headers.get("sec-fetch-mode") == "navigate"


def _is_at(origin: str, host: str) -> bool:
    scheme, _, authority = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme, ":")
    return authority.removesuffix(default) == host.lower().removesuffix(default)


def may_be_forged(headers: Mapping[str, str]) -> bool:
    """Return whether it may be a form's, with what its browser adds by itself; old ones send no Origin."""
    if headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json"):
        return False  # a page has to ask before it may send that
    scheme = headers.get("authorization", "").partition(" ")[0].lower()
    return scheme == "basic" or "cookie" in headers


def _name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).rstrip(".").lower()


def _is_known(host: str, hosts: frozenset[str]) -> bool:
    name = _name(host)
    if "." not in name or name in hosts or name.endswith(".localhost"):
        return True  # without a dot: a name of this machine or its network, which no public page can have
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True  # an address: no name was looked up


class OriginMiddleware:
    """Wraps an app: answers what a page may not do, and tells browsers which pages may read answers.

    Starlette's middleware does the latter; it is left out where no origin is allowed.
    """

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self._callers = callers
        self._app = app
        if callers.origins:
            self._app = CORSMiddleware(
                app,
                allow_origins=sorted(callers.origins),
                allow_methods=["*"],
                allow_headers=["*"],  # SDKs send many of their own
                allow_private_network=True,
                expose_headers=[
                    "x-request-id",
                    "retry-after",
                    "retry-after-ms",
                    IGNORED,
                    RELAXED,
                    *RATE_HEADERS,
                ],
                max_age=PREFLIGHT_S,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        refusal = self._callers.refusal(scope["method"], Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        code, message = refusal
        await reply(scope["path"], 403, error_object(message, 403, code=code))(scope, receive, send)
