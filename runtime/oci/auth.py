"""Logs in to a registry: answers its challenges with Basic credentials or a token, fetched when needed.

Tokens are renewed a little before they expire, and once more when refused. When all credentials are
refused, the error names registry, user and file of each. Start at `Login`.
"""

import base64
import fnmatch
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import requests

from runtime.errors import RegistryError
from runtime.net import RetriableError
from runtime.oci import azure
from runtime.oci.credentials import Credential, find
from runtime.oci.reference import Reference
from runtime.oci.transport import Transport, explain, raise_if_busy

_TOKEN_LIFETIME_S = 60.0
"""Lifetime of a token whose issuer does not state one (the token specification's default)."""
_PARAMETER = re.compile(r'(\w+)\s*=\s*(?:"([^"]*)"|([^\s,"]+))')


@dataclass(slots=True)
class _Token:
    header: str
    renew_at: float
    """`time.monotonic()` from when on a new one is fetched first."""
    accepted: bool = False
    """Whether the registry accepted it at least once: then a refusal means expired, else not permitted."""


class Login:
    """The login of one transport to one repository, for `actions` such as "pull,push"."""

    def __init__(self, transport: Transport, reference: Reference, actions: str):
        self._transport, self._reference = transport, reference
        self._scopes = [f"repository:{reference.repository}:{actions}"]
        self._actions = actions
        self._candidates = self._find()
        self._credential: Credential | None = None
        self._refusals: list[str] = []
        self._challenge: dict[str, str] | None = None
        self._token: _Token | None = None
        self._lock = threading.Lock()
        transport.authorize = self.authorize
        transport.refused = self.refused
        transport.accepted = self.accepted

    def add_source(self, repository: str) -> None:
        """Ask for the right to read another repository too, to mount blobs from it."""
        scope = f"repository:{repository}:pull"
        if scope not in self._scopes:
            self._scopes.append(scope)
            self._token = None

    def authorize(self) -> str | None:
        """Return the Authorization header for the next request; None before the first challenge."""
        with self._lock:
            if self._challenge is None:
                return None
            if self._challenge["scheme"] == "basic":
                return self._credential.basic if self._credential else None
            if self._token is None or time.monotonic() >= self._token.renew_at:
                self._token = self._log_in()
            return self._token.header

    def refused(self, response: requests.Response, header: str | None) -> None:
        """Prepare another try after a 401; RegistryError when no credential is left."""
        with self._lock:
            if self._challenge is None:
                self._challenge = _challenge(response, str(self._reference))
                self._credential = next(self._candidates, None)
            elif header is not None and self._challenge["scheme"] == "bearer":
                if self._token is None or header != self._token.header:
                    return  # another thread is renewing it
                if not self._token.accepted:
                    self._try_next(f"may not {self._actions}{explain(response)}")
                self._token = None
            elif header is not None:
                self._try_next(f"refused{explain(response)}")
            if self._challenge["scheme"] == "basic" and self._credential is None:
                raise self._denied()

    def accepted(self) -> None:
        """Note that the registry accepted the current token."""
        if self._token is not None:
            self._token.accepted = True

    def _find(self) -> Iterator[Credential]:
        reference, access = self._reference, self._transport.access
        yield from find(reference.registry, reference.repository, access)
        identity = access.azure
        if identity and any(fnmatch.fnmatchcase(reference.registry, host) for host in identity.registries):
            yield azure.refresh_token(identity, self._transport)

    def _try_next(self, refusal: str) -> None:
        """Switch to the next credential after `refusal` of the current one."""
        self._refusals.append(f"{self._credential or 'without credentials'}: {refusal}")
        self._credential = next(self._candidates, None)
        if self._credential is None:
            raise self._denied()

    def _denied(self) -> RegistryError:
        tried = "; ".join(self._refusals) or "no credentials found"
        return RegistryError(
            f"{self._reference}: the registry {self._reference.registry} refused to let us"
            f" {self._actions} ({tried}); log in again or fix the push secret"
        )

    def _log_in(self) -> _Token:
        """Fetch a token with the first credential that is not refused."""
        while True:
            response = self._request_token()
            if response.status_code == 200:
                break
            self._try_next(f"login refused with {response.status_code}{explain(response)}")
        try:
            reply = response.json()
            token = str(reply.get("access_token") or reply["token"])
            lifetime_s = float(reply.get("expires_in") or _jwt_lifetime_s(token) or _TOKEN_LIFETIME_S)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RegistryError(f"{self._reference.registry}: its token server sent no token") from None
        return _Token(f"Bearer {token}", time.monotonic() + lifetime_s - min(60.0, lifetime_s / 5))

    def _request_token(self) -> requests.Response:
        challenge = self._challenge or {}
        realm = urljoin(f"{self._transport.prefix}://{self._transport.host}/", challenge.get("realm", ""))
        if urlsplit(realm).scheme != "https" and self._transport.prefix == "https":
            raise RegistryError(
                f"{self._reference.registry}: asks to log in over plain HTTP at {realm!r}; refused"
            )
        fields: dict[str, object] = {"scope": self._scopes}
        if challenge.get("service"):
            fields["service"] = challenge["service"]
        retries = self._transport.retries(f"log in at {urlsplit(realm).netloc}")
        while True:
            try:
                response = self._exchange(realm, fields)
                raise_if_busy(response)
            except RetriableError as error:
                retries.failed(error)
            else:
                return response

    def _exchange(self, realm: str, fields: dict[str, object]) -> requests.Response:
        credential = self._credential
        if credential is not None and credential.kind == "identity":
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credential.secret,
                "client_id": "workspace-runtime",
            }
            form |= {"scope": " ".join(self._scopes)} | {
                k: str(v) for k, v in fields.items() if k == "service"
            }
            return self._transport.plain("POST", realm, data=form)
        query = requests.models.PreparedRequest()
        query.prepare_url(realm, fields)
        headers = {"Authorization": credential.basic} if credential else {}
        return self._transport.plain("GET", query.url or realm, headers=headers)


def _challenge(response: requests.Response, where: str) -> dict[str, str]:
    """Return scheme, realm and service of a 401."""
    text = response.headers.get("WWW-Authenticate", "")
    scheme, _, rest = text.partition(" ")
    found = {key.lower(): quoted or bare for key, quoted, bare in _PARAMETER.findall(rest)}
    if scheme.lower() == "bearer" and not found.get("realm"):
        scheme = ""
    if scheme.lower() not in {"bearer", "basic"}:
        raise RegistryError(f"{where}: answers 401 without a usable WWW-Authenticate ({text[:100]!r})")
    return found | {"scheme": scheme.lower()}


def _jwt_lifetime_s(token: str) -> float | None:
    """Return the seconds from issue to expiry of a JWT; clocks may differ, so its dates are not used."""
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return max(1.0, float(claims["exp"]) - float(claims["iat"]))
    except (ValueError, LookupError, TypeError):
        return None
