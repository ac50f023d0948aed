"""HTTP to one registry: timeouts, bounded retries, authorization, redirects one hop at a time.

`Transport` is oras' `Registry` with its request function replaced: oras has no timeouts, retries only
500 (and everything else for 131 s), and sends an expired token again. Credentials go to the registry's own
host and, by `log_in_at`, to its token server; nowhere else. Start at `Transport.send`.
"""

import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urljoin, urlsplit, urlunsplit

import oras.provider
import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from runtime import addresses
from runtime.errors import RegistryError
from runtime.net import RetriableError, Retries, proxy_for
from runtime.oci import tls
from runtime.oci.access import Access
from runtime.oci.blobs import READ_BYTES
from runtime.oci.hosts import host_of, is_loopback, same_host
from runtime.oci.responses import (
    raise_if_busy,
    read_body,
    readable_errors,
    refused_by_proxy,
    short,
)

Body = Callable[[], Any]
"""Makes a new body for each try: a file-like object with a length, or a form."""
_MOST_REDIRECTS = 8
_STALL_S = 60.0
"""How long a registry may not take a byte of a body: some pause while they move what they have to storage."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request before it is known where it will end."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: Body | None = None
    stream: bool = False
    """Leave the body of the answer unread."""
    patience_s: float = 0.0
    """Seconds to wait for the answer beyond the usual: a registry stores a large blob before it answers."""


class Transport(oras.provider.Registry):  # type: ignore[misc]  # oras is untyped
    """Requests to one registry host; `authorize` and `answered` are set by the login (auth.py)."""

    def __init__(self, host: str, access: Access):
        super().__init__(hostname=host, insecure=False, tls_verify=not access.insecure)
        self.host, self.access = host, access
        self.session.trust_env = False  # netrc and CA variables; the proxies are looked up in `plain`
        self.session.headers["User-Agent"] = "workspace-runtime"
        context = tls.context(access, host)  # a tenth of a second: the system's certificates are read
        for scheme in ("https://", "http://"):
            self.session.mount(scheme, _Adapter(context, host))
        self.authorize: Callable[[], str | None] = lambda: None
        """Returns the Authorization header for a request to the registry."""
        self.answered: Callable[[requests.Response, str | None], bool] = lambda response, header: False
        """Takes each answer and the header that got it; True sends the request again."""
        if access.insecure or is_loopback(host):
            self.prefix = self._probe()

    @property
    def base(self) -> str:
        """The registry's own address."""
        return f"{self.prefix}://{self.host}/"

    def close(self) -> None:
        """Close the connections."""
        self.session.close()

    def retries(self, what: str) -> Retries:
        """Return the retries of `what`, as many as the access settings allow."""
        return Retries(what, attempts=self.access.attempts, backoff_s=self.access.backoff_s)

    def do_request(  # noqa: PLR0913, PLR0917 - oras' signature
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
    ) -> requests.Response:
        """Send an idempotent request until it is answered (overrides oras)."""
        retries = self.retries(f"{method} {short(url)}")
        request = Outgoing(method, url, headers or {}, (lambda: data) if data else None, stream)
        while True:
            try:
                response = self.send(request)
                raise_if_busy(response)
            except RetriableError as error:
                retries.failed(error)
            else:
                return response

    def send(self, request: Outgoing) -> requests.Response:
        """Send a request where redirects lead, each hop with credentials only at the registry's own host.

        Raises RetriableError when the connection broke, RegistryError when access is denied; the caller
        handles all other statuses. `url` of the response is that of the last hop.
        """
        for _ in range(_MOST_REDIRECTS):
            response = self._send_authorized(request)
            if not response.is_redirect:
                return response
            request = _redirected(request, response)
        raise RegistryError(f"{short(request.url)}: too many redirects; check the registry's address")

    def log_in_at(
        self, url: str, *, form: Mapping[str, str] | None = None, authorization: str | None = None
    ) -> requests.Response:
        """POST `form`, or GET with `authorization`, at a token server; redirects stay at its host.

        RegistryError unless the address may be given credentials: over https, except on this machine or
        where plain HTTP is allowed and the registry itself is spoken to in it.
        """
        headers = {"Authorization": authorization} if authorization else {}
        body = (lambda: form) if form is not None else None
        request = Outgoing("GET" if form is None else "POST", url, headers, body)
        for _ in range(_MOST_REDIRECTS):
            self._check_token_server(request.url)
            response = self.plain(request, elsewhere=True)
            if not response.is_redirect:
                return response
            request = _redirected(request, response)
            if not same_host(request.url, url):
                raise RegistryError(
                    f"{short(url)}: redirects the login to {short(request.url)}; credentials do not follow"
                )
        raise RegistryError(f"{short(url)}: too many redirects; check the registry's token server")

    def plain(
        self, request: Outgoing, *, elsewhere: bool = False, timeout: tuple[float, float] | None = None
    ) -> requests.Response:
        """Send one request as it is, no redirect followed; RetriableError when the connection broke.

        elsewhere: the address came from outside, so that forbidden ones are refused.
        timeout: seconds to connect and to wait, instead of the access settings'.
        """
        access, url = self.access, request.url
        timeout = timeout or (access.connect_timeout_s, access.read_timeout_s + request.patience_s)
        payload = request.body() if request.body else None
        try:
            proxy = proxy_for(url)
            with readable_errors(url, proxy):
                if elsewhere:
                    _check_host(url, self.host)
                prepared = self.session.prepare_request(
                    requests.Request(
                        request.method,
                        url,
                        data=payload,
                        headers=dict(request.headers),
                        auth=_keep_header,  # else requests takes user and password out of the URL
                    )
                )
                # By the adapter: a session would parse the address of a redirect, and read its whole body.
                adapter = self.session.get_adapter(url)
                response: requests.Response = adapter.send(
                    prepared, stream=True, timeout=timeout, proxies={"all": proxy} if proxy else {}
                )
        finally:
            if isinstance(payload, _Closable):  # a body that was not read to its end keeps a file open
                payload.close()
        if response.status_code == 407:
            raise refused_by_proxy(url, response, proxy)
        if not request.stream or response.is_redirect:
            read_body(response, url)
        return response

    def _send_authorized(self, request: Outgoing) -> requests.Response:
        """Send one hop, again while the login has other credentials to try."""
        own = self._is_own(request.url)
        if own:  # a registry behind a TLS proxy may return http URLs; credentials never go there
            parts = urlsplit(request.url)
            request = replace(request, url=urlunsplit(parts._replace(scheme=self.prefix, netloc=self.host)))
        while True:
            header = self.authorize() if own else None
            sent = (
                replace(request, headers={**request.headers, "Authorization": header}) if header else request
            )
            response = self.plain(sent, elsewhere=not own)
            if not own or not self.answered(response, header):
                return response
            response.close()

    def _is_own(self, url: str) -> bool:
        """Whether `url` is at the registry's host, by whatever scheme."""
        try:
            return host_of(url) in {host_of(self.base), host_of(f"{urlsplit(url).scheme}://{self.host}")}
        except ValueError:
            raise RegistryError(f"{self.host}: sent an address that cannot be used") from None

    def _check_token_server(self, url: str) -> None:
        try:
            parts, host = urlsplit(url), host_of(url)
        except ValueError:
            parts, host = urlsplit(""), ("", None)
        if parts.scheme not in {"http", "https"} or not host[0] or "@" in parts.netloc:
            raise RegistryError(f"{self.host}: names a token server that cannot be used ({short(url)!r})")
        local = is_loopback(self.host) and is_loopback(host[0])
        allowed = self.access.insecure and self.prefix == "http" and host[0] == host_of(self.base)[0]
        if parts.scheme != "https" and not local and not allowed:
            raise RegistryError(f"{self.host}: asks to log in over plain HTTP at {short(url)!r}; refused")

    def _probe(self) -> str:
        """Return "https" if the registry uses TLS, else "http"."""
        try:
            self.plain(Outgoing("GET", f"https://{self.host}/v2/", {}))
        except RetriableError:
            return "http"
        return "https"


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class _Adapter(HTTPAdapter):
    """Our TLS settings, connections, and bodies in large blocks: 16 kB at a time costs as much CPU as TLS."""

    def __init__(self, context: ssl.SSLContext, registry: str):
        self._context, self._pools = context, _pools(registry)
        super().__init__(pool_maxsize=16)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, blocksize=READ_BYTES)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options, blocksize=READ_BYTES)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def build_connection_pool_key_attributes(
        self, request: Any, verify: Any, cert: Any = None
    ) -> tuple[Any, Any]:
        where, _ = super().build_connection_pool_key_attributes(request, verify, cert)
        return where, {"ssl_context": self._context, "cert_reqs": self._context.verify_mode}

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Do nothing: the TLS settings say what is trusted."""


class _Connection(HTTPConnection):
    """Looks its name up once, and connects to an address that was checked; a proxy's is not."""

    registry = ""
    """The host, with or without a port, that the operator has named."""

    def _new_conn(self) -> socket.socket:
        if self.proxy is not None:  # of the operator's choice, and it looks the registry's name up
            return super()._new_conn()
        name, failure = self._dns_host, None
        try:
            for address in _allowed(self, self.registry):
                self._dns_host = address
                try:
                    return super()._new_conn()
                except (NewConnectionError, ConnectTimeoutError) as error:
                    failure = error
        finally:
            self._dns_host = name
        raise failure or NewConnectionError(self, f"{self.host} has no address")

    def connect(self) -> None:
        super().connect()
        if self.sock is not None:
            self.sock.settimeout(_STALL_S)


def _pools(named: str) -> dict[str, type[HTTPConnectionPool]]:
    """Return the pools of connections, by scheme, of one registry: urllib3 takes classes alone."""

    class Plain(_Connection):
        registry = named

    class Tls(_Connection, HTTPSConnection):
        registry = named

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


def _allowed(connection: HTTPConnection, registry: str) -> tuple[str, ...]:
    """Return the addresses of a connection's host; RegistryError when one is forbidden.

    Numeric hosts are checked, where they come from outside, before there is a connection.
    """
    host = connection.host.strip("[]")
    try:
        found = addresses.resolve(host, connection.port or 443)
    except socket.gaierror as error:
        raise NameResolutionError(host, connection, error) from error
    named = _is_host(host, registry)
    for address in found:
        if address != host and addresses.forbidden(address, named=named):
            raise _forbidden(host, address)
    return found


def _check_host(url: str, registry: str) -> None:
    """Raise RegistryError when the host of `url` says by itself that it is a forbidden address."""
    host = urlsplit(url).hostname or ""
    found = addresses.forbidden_literal(host, named=_is_host(host, registry))
    if found:
        raise _forbidden(host, found)


def _is_host(name: str, registry: str) -> bool:
    """Whether `name` is the registry's host, on any port: the token server may be there too."""
    return name.lower().rstrip(".") == host_of(f"//{registry}")[0]


def _forbidden(name: str, address: str) -> RegistryError:
    return RegistryError(f"{name}: leads to {address}, {addresses.kind(address)}; nothing is sent there")


def _redirected(request: Outgoing, response: requests.Response) -> Outgoing:
    """Return the request that a redirect asks for: the same again (RFC 9110, 15.4), a GET after 303."""
    try:
        url = urljoin(response.url, response.headers["Location"])
    except ValueError:
        raise RegistryError(f"{short(request.url)}: redirects to an address that cannot be used") from None
    if response.status_code == 303 and request.method not in {"GET", "HEAD"}:
        return Outgoing("GET", url, {}, stream=request.stream)
    return replace(request, url=url)


def _keep_header(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
