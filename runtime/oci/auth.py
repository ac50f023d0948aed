"""Logs in to a registry: answers its challenges with Basic credentials or a token, fetched when needed.

Each credential is tried by every way that the registry offers and it is good for. Tokens are renewed a little
before they expire, and once more when refused. When all are refused, the error names registry, user and file
of each, and every file and helper that had to be skipped. Start at `Login`.
"""

import fnmatch
import threading
import time
from collections.abc import Iterator
from urllib.parse import urljoin

import requests

from runtime.errors import RegistryError, TransientError
from runtime.net import RetriableError
from runtime.oci import azure, challenges
from runtime.oci.challenges import Challenge
from runtime.oci.credentials import Credential, find
from runtime.oci.reference import Reference
from runtime.oci.responses import explain
from runtime.oci.store import AccessDeniedError
from runtime.oci.tokens import AccessToken, LoginRefusedError, TokenRequest, fetch
from runtime.oci.transport import Outgoing, Transport

_USED_FOR = {"password": {"bearer", "basic"}, "identity": {"bearer"}, "token": {"bearer"}}
"""Schemes by kind of credential: neither a refresh token nor a ready token is sent as a password."""
_ADVICE = "log in again, or fix the push secret and its rights"


class Login:
    """The login of one transport to one repository, for `actions` such as "pull,push"."""

    def __init__(self, transport: Transport, reference: Reference, actions: str):
        self._transport, self._reference = transport, reference
        self._scopes = [f"repository:{reference.repository}:{actions}"]
        self._actions = actions
        self._skipped: list[str] = []
        self._refusals: list[str] = []
        self._challenges: list[Challenge] = []
        self._asked_base = False
        self._ways: Iterator[tuple[Credential | None, Challenge]] = iter(())
        self._way: tuple[Credential | None, Challenge] | None = None
        """The credential and the challenge that it answers; None before the first challenge."""
        self._token: AccessToken | None = None
        self._lock = threading.Lock()
        transport.authorize = self.authorize
        transport.answered = self.answered

    def add_source(self, repository: str) -> None:
        """Ask for the right to read another repository too, to mount blobs from it."""
        scope = f"repository:{repository}:pull"
        if scope not in self._scopes:
            self._scopes.append(scope)
            self._token = None

    def authorize(self) -> str | None:
        """Return the Authorization header for the next request; None before the first challenge."""
        with self._lock:
            while self._way is not None:
                if (header := self._header()) is not None:
                    return header
                if self._way is not None:
                    self._log_in(*self._way)
            return None

    def answered(self, response: requests.Response, header: str | None) -> bool:
        """Take note of an answer; True when the request is worth another try with other credentials.

        Raises RegistryError when access is denied and no credential is left.
        """
        with self._lock:
            if response.status_code in {401, 403}:
                if header is None:
                    return self._challenged(response)
                self._refused(response, header)
                return True
            if response.status_code == 404 and header is None and self._way is None:
                return self._choose(self._ask_base())
            if self._token is not None and header == self._token.header:
                self._token.accepted = True
            return False

    def _challenged(self, response: requests.Response) -> bool:
        """Choose a way to log in after an anonymous request was refused; RegistryError without one."""
        if self._way is not None:  # another thread has chosen
            return True
        offered = response.headers.get("WWW-Authenticate", "") if response.status_code == 401 else ""
        if self._choose(challenges.parse(offered) or self._ask_base()):
            return True
        if self._challenges:
            raise self._denied()
        if response.status_code == 403:
            raise AccessDeniedError(f"{self._reference}: forbidden (403{explain(response)}); {_ADVICE}")
        raise RegistryError(
            f"{self._reference}: answers 401 without a usable WWW-Authenticate ({offered[:100]!r})"
        )

    def _choose(self, offered: list[Challenge]) -> bool:
        """Take the first credential for one of the challenges; whether there is one."""
        self._challenges, self._ways = offered, self._find_ways()
        self._skipped.clear()
        self._way = next(self._ways, None)
        return self._way is not None

    def _ask_base(self) -> list[Challenge]:
        """Return the challenges of the registry's base address: some hide private repositories behind 404."""
        if self._asked_base:
            return []
        self._asked_base = True
        try:
            response = self._transport.plain(Outgoing("GET", urljoin(self._transport.base, "v2/"), {}))
        except RetriableError:
            return []
        return (
            challenges.parse(response.headers.get("WWW-Authenticate", ""))
            if response.status_code == 401
            else []
        )

    def _refused(self, response: requests.Response, header: str) -> None:
        """Prepare another try after a 401 or 403; RegistryError when no credential is left."""
        if self._way is None or header != self._last_header():
            return  # another thread has prepared it
        if response.status_code == 403:
            self._next(f"forbidden (403{explain(response)})")
        elif self._token is None:
            self._next(f"refused{explain(response)}")
        elif self._token.accepted:  # expired
            self._token = None
        else:
            self._next(f"may not {self._actions}{explain(response)}")

    def _header(self) -> str | None:
        """Return the header to send, None when a token has to be fetched first."""
        expired = self._token is not None and time.monotonic() >= self._token.renew_at
        return None if expired else self._last_header()

    def _last_header(self) -> str | None:
        """Return the header of the present way, if only of an expired token."""
        credential, challenge = self._way or (None, None)
        if credential is not None and credential.kind == "token":
            return f"Bearer {credential.secret}"
        if credential is not None and challenge is not None and challenge.scheme == "basic":
            return credential.basic
        return self._token.header if self._token is not None else None

    def _log_in(self, credential: Credential | None, challenge: Challenge) -> None:
        """Fetch a token, or go on to the next way when the credential is refused."""
        realm = urljoin(self._transport.base, challenge.realm)
        request = TokenRequest(realm, challenge.service, tuple(self._scopes), credential)
        try:
            self._token = fetch(self._transport, request)
        except LoginRefusedError as refusal:
            self._next(str(refusal))

    def _find_ways(self) -> Iterator[tuple[Credential | None, Challenge]]:
        """Yield each credential with each challenge that it can answer; without any, a login without one."""
        found = False
        for credential in self._find_credentials():
            for challenge in self._challenges:
                if challenge.scheme in _USED_FOR[credential.kind] and (
                    challenge.realm or challenge.scheme == "basic" or credential.kind == "token"
                ):
                    found = True
                    yield credential, challenge
                    if credential.kind == "token":
                        break
        if not found:
            yield from ((None, each) for each in self._challenges if each.scheme == "bearer" and each.realm)

    def _find_credentials(self) -> Iterator[Credential]:
        reference, access = self._reference, self._transport.access
        yield from find(reference.registry, reference.repository, access, skipped=self._skipped)
        identity = access.azure
        if identity is None or not any(
            fnmatch.fnmatchcase(reference.registry.lower(), host) for host in identity.registries
        ):
            return
        try:
            yield azure.refresh_token(identity, self._transport)
        except RegistryError as error:
            self._skipped.append(str(error))
        except TransientError as error:
            if identity.client_id or identity.token_file:  # else there need not be one
                raise
            self._skipped.append(str(error))

    def _next(self, refusal: str) -> None:
        """Go on to the next way, after `refusal` of the present one; RegistryError without one."""
        credential = self._way[0] if self._way else None
        self._refusals.append(f"{credential or 'without credentials'}: {refusal}")
        self._token = None
        self._way = next(self._ways, None)
        if self._way is None:
            raise self._denied()

    def _denied(self) -> RegistryError:
        without_realm = all(each.scheme == "bearer" and not each.realm for each in self._challenges)
        if without_realm and self._challenges and not self._refusals:
            return RegistryError(
                f"{self._reference}: the registry {self._reference.registry} asks for a token without the"
                " realm, the address that gives tokens; no login helps: mend the registry's configuration"
            )
        tried = "; ".join([*self._skipped, *self._refusals]) or "no credentials found"
        return AccessDeniedError(
            f"{self._reference}: the registry {self._reference.registry} refused to let us"
            f" {self._actions} ({tried}); {_ADVICE}"
        )
