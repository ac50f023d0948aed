"""Fetches an access token from a registry's token server, with a credential or without.

The server is the realm that the registry named; what it is sent goes nowhere else (`Transport.log_in_at`).
Start at `fetch`.
"""

import base64
import json
import re
import time
from dataclasses import dataclass, field

import requests

from runtime.errors import RegistryError
from runtime.net import RetriableError
from runtime.oci.credentials import Credential
from runtime.oci.responses import explain, raise_if_busy, short, succeeded
from runtime.oci.transport import Transport

_LIFETIME_S = 60.0
"""Lifetime of a token whose issuer does not state one (the token specification's default)."""
_LONGEST_LIFETIME_S = 30 * 24 * 3600.0
_TOKEN = re.compile(r"[\x21-\x7e]+")


class LoginRefusedError(Exception):
    """The token server did not give a token for this credential."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a token is for, and who asks."""

    realm: str
    """Address of the token server."""
    service: str
    scopes: tuple[str, ...]
    credential: Credential | None
    """None asks for what everybody may do."""


@dataclass(slots=True)
class AccessToken:
    """An access token."""

    header: str = field(repr=False)
    renew_at: float
    """`time.monotonic()` from when on a new one is fetched first."""
    accepted: bool = False
    """Whether the registry accepted it at least once: then a refusal means expired, else not permitted."""


def fetch(transport: Transport, request: TokenRequest) -> AccessToken:
    """Return a token; LoginRefusedError with the server's reason.

    Raises RegistryError when the server may not be asked, or breaks the protocol.
    """
    retries = transport.retries(f"log in at {short(request.realm)}")
    while True:
        try:
            response = _ask(transport, request)
            raise_if_busy(response)
            break
        except RetriableError as error:
            retries.failed(error)
    if not succeeded(response):
        raise LoginRefusedError(f"login refused with {response.status_code}{explain(response)}")
    try:
        reply = response.json()
        token = reply.get("access_token") or reply["token"]
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise ValueError
        stated = float(reply.get("expires_in") or _jwt_lifetime_s(token) or _LIFETIME_S)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise RegistryError(
            f"{transport.host}: its token server {short(request.realm)} sent no token"
        ) from None
    lifetime_s = stated if 0 < stated < _LONGEST_LIFETIME_S else _LIFETIME_S
    return AccessToken(f"Bearer {token}", time.monotonic() + lifetime_s - min(60.0, lifetime_s / 5))


def _ask(transport: Transport, request: TokenRequest) -> requests.Response:
    credential = request.credential
    if credential is not None and credential.kind == "identity":
        form = {
            "grant_type": "refresh_token",
            "refresh_token": credential.secret,
            "client_id": "workspace-runtime",
            "scope": " ".join(request.scopes),
        }
        if request.service:
            form["service"] = request.service
        return transport.log_in_at(request.realm, form=form)
    query = [("scope", scope) for scope in request.scopes]
    if request.service:
        query.append(("service", request.service))
    prepared = requests.models.PreparedRequest()
    try:
        prepared.prepare_url(request.realm, query)
    except (requests.exceptions.RequestException, ValueError):
        raise RegistryError(
            f"{transport.host}: names a token server that cannot be used ({short(request.realm)!r})"
        ) from None
    authorization = credential.basic if credential is not None else None
    return transport.log_in_at(prepared.url or request.realm, authorization=authorization)


def _jwt_lifetime_s(token: str) -> float | None:
    """Return the seconds from issue to expiry of a JWT; clocks may differ, so its dates are not used."""
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return max(1.0, float(claims["exp"]) - float(claims["iat"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
