"""GET requests for one data file: redirects one checked hop at a time, each to an address that was checked.

Each connection looks its name up once, checks every address found and connects to one of them. Behind a
proxy, which looks names up itself, only what a URL says by itself is checked. Does not know files. Start at
`Hops.get`.
"""

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx
from pydantic import SecretStr

from runtime import addresses, logs, net
from runtime.errors import ConfigError, DataError
from runtime.net import DownloadLimits
from runtime.tuning.data import urls
from runtime.tuning.data.urls import shown

log = logging.getLogger(__name__)

HUB_HOSTS = frozenset({"huggingface.co", "hf.co"})
"""Hosts that the Hugging Face token is sent to; a redirect elsewhere goes without it."""

_REDIRECTS = 5
_CONNECT_S = 10.0


class Hops:
    """The connections for one file, of whatever hosts its redirects lead to."""

    def __init__(self, url: str, token: SecretStr | None, *, allow_private: bool, limits: DownloadLimits):
        self.url = url
        self._token, self._allow_private = token, allow_private
        self._timeout = httpx.Timeout(limits.stall_s, connect=_CONNECT_S)
        self._open = contextlib.ExitStack()
        self._connection: Any = None
        self._hung_up = False

    def close(self) -> None:
        """Close the connections."""
        self._open.close()

    @contextlib.contextmanager
    def get(self, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """GET the URL, following redirects one checked hop at a time, the token sent to the hub only."""
        url = self.url
        for _ in range(_REDIRECTS + 1):
            client = self._client(url)
            parts = urlsplit(url)
            secret = {}
            if self._token is not None and parts.scheme == "https" and parts.hostname in HUB_HOSTS:
                secret = {"Authorization": f"Bearer {self._token.get_secret_value()}"}
            traced = {"trace": self._trace}
            with client.stream("GET", url, headers={**headers, **secret}, extensions=traced) as response:
                if response.status_code in (401, 403):
                    raise DataError(
                        f"{shown(self.url)}: answered {response.status_code}, expected the file; "
                        "is HF_TOKEN set, or the signature expired?"
                    )
                if not response.has_redirect_location:
                    yield response
                    return
                url = self._redirected(url, response.headers["Location"])
        raise DataError(f"{shown(self.url)}: more than {_REDIRECTS} redirects")

    def _client(self, url: str) -> httpx.Client:
        """Return the client for one hop; DataError where its URL is none to fetch."""
        try:
            problem = urls.problem_of(url)
            host = "" if problem else httpx.URL(url).host
        except (httpx.InvalidURL, ValueError):
            problem = "not a valid address"
        if problem:
            raise DataError(f"{shown(url)}: {problem}")
        if found := addresses.forbidden_literal(host):
            raise DataError(f"{shown(url)}: {urls.refusal(found)}")
        proxy = net.proxy_for(url)
        return self._direct if proxy is None else self._through(proxy, host)

    @cached_property
    def _direct(self) -> httpx.Client:
        transport = _PinnedTransport(self._check)
        return self._open.enter_context(httpx.Client(timeout=self._timeout, transport=transport))

    def _through(self, proxy: str, host: str) -> httpx.Client:
        """Return a client that goes through `proxy`, which is of the operator's choice and not checked."""
        name, address = net.shown_proxy(proxy), addresses.literal(host)
        if address is not None:
            self._check(host, address)
        elif not self._allow_private:
            raise ConfigError(
                f"{host}: data.allow_private_addresses is false, but the proxy {name} looks names up, and "
                "what they lead to cannot be checked; put the host into NO_PROXY, or allow private addresses"
            )
        said = f"data is fetched through the proxy {name}, which decides what names lead to"
        logs.once(log, logging.INFO, said)
        try:
            where = proxy if "://" in proxy else f"http://{proxy}"
            return self._open.enter_context(httpx.Client(timeout=self._timeout, proxy=where))
        except (ImportError, ValueError, httpx.InvalidURL):
            raise ConfigError(f"the proxy {name}: expected an HTTP proxy; check HTTPS_PROXY") from None

    def _check(self, host: str, address: str) -> None:
        """Raise DataError when `address`, which `host` led to, must not be connected to."""
        if addresses.forbidden(address):
            raise DataError(f"{host}: {urls.refusal(address)}")
        if not self._allow_private and addresses.private(address):
            raise DataError(
                f"{host}: leads to the private address {address}, and those are forbidden here "
                "(data.allow_private_addresses)"
            )

    def _redirected(self, url: str, location: str) -> str:
        try:
            return urljoin(url, location)
        except ValueError:
            raise DataError(f"{shown(self.url)}: redirects to what is not a valid address") from None

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember the connection that httpx opened, for `hang_up`, which may have been called before."""
        if event == "connection.connect_tcp.complete":
            self._connection = info["return_value"]
            if self._hung_up:
                self._shut_down()

    def hang_up(self) -> None:
        """End a request that waits for a silent server; called from another thread at the end."""
        self._hung_up = True
        self._shut_down()

    def _shut_down(self) -> None:
        opened = self._connection and self._connection.get_extra_info("socket")
        if opened:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)


class _PinnedTransport(httpx.HTTPTransport):
    """httpx' own, whose connections are those of `_CheckedBackend`: it has no argument for that."""

    def __init__(self, check: Callable[[str, str], None]) -> None:
        super().__init__()
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(), network_backend=_CheckedBackend(check)
        )


class _CheckedBackend(httpcore.SyncBackend):
    """Looks a name up once, checks every address found, and connects to these in turn.

    The name stays what the certificate and the Host header are about.
    """

    def __init__(self, check: Callable[[str, str], None]) -> None:
        self._check = check

    def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.NetworkStream:
        try:
            found = addresses.resolve(host, port)
        except OSError:
            raise httpcore.ConnectError(f"host {host} cannot be resolved") from None
        for address in found:
            self._check(host, address)
        failure: Exception = httpcore.ConnectError(f"host {host} has no address")
        for address in found:
            try:
                return super().connect_tcp(address, port, *args, **options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure
