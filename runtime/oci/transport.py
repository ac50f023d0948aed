"""HTTP to one registry: timeouts, bounded retries, authorization, and errors a user can act on.

`Transport` is oras' `Registry` with its request function replaced: oras has no timeouts, retries only
500 (and everything else for 131 s), and sends an expired token again. Start at `Transport.send`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

import oras.provider
import requests
from requests.adapters import HTTPAdapter

from runtime.errors import RegistryError
from runtime.logs import redact
from runtime.net import RETRIED, RetriableError, Retries, raise_if_retriable
from runtime.oci.access import Access
from runtime.oci.blobs import READ_BYTES

MOST_BODY_BYTES = 4 << 20
"""Manifests, tokens and error messages are read up to this size, that of the largest manifest taken."""

Body = Callable[[], Any]
"""Makes a new body for each try: a file-like object with a length."""


class Transport(oras.provider.Registry):  # type: ignore[misc]  # oras is untyped
    """Requests to one registry host; `authorize` and `refused` are set by the login (auth.py)."""

    def __init__(self, host: str, access: Access):
        verify: bool | str = str(access.ca_file) if access.ca_file else not access.insecure
        super().__init__(hostname=host, insecure=False, tls_verify=verify)
        self.host, self.access, self.verify = host, access, verify
        self.session.mount("https://", _Adapter(pool_maxsize=16))
        self.session.mount("http://", _Adapter(pool_maxsize=16))
        self.session.headers["User-Agent"] = "workspace-runtime"
        self.authorize: Callable[[], str | None] = lambda: None
        """Returns the Authorization header for a request to the registry."""
        self.refused: Callable[[requests.Response, str | None], None] = _raise_refused
        """Takes a 401 and the header that got it; returns when another try makes sense, raises otherwise."""
        self.accepted: Callable[[], None] = lambda: None
        """Called when the registry accepted the header."""
        if access.insecure or _is_loopback(host):
            self.prefix = self._probe()

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
        retries = self.retries(f"{method} {_short(url)}")
        while True:
            try:
                response = self.send(
                    method, url, headers=headers, body=(lambda: data) if data else None, stream=stream
                )
                raise_if_busy(response)
            except RetriableError as error:
                retries.failed(error)
            else:
                return response

    def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """Send one request, again if the registry asks for credentials or newer ones.

        Raises RetriableError when the connection broke, RegistryError when access is denied; the caller
        handles all other statuses.
        """
        parts = urlsplit(url)
        own = parts.netloc == self.host
        if own:  # a registry behind a TLS proxy may return http URLs; credentials never go there
            url = urlunsplit(parts._replace(scheme=self.prefix))
        while True:
            header = self.authorize() if own else None
            sent = dict(headers or {}) | ({"Authorization": header} if header else {})
            response = self.plain(method, url, headers=sent, data=body, stream=stream)
            if response.status_code == 403 and own:
                raise RegistryError(
                    f"{_short(url)}: forbidden (403{explain(response)}); ask for the right to {method}"
                )
            if response.status_code != 401 or not own:
                self.accepted()
                return response
            response.close()
            self.refused(response, header)

    def plain(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        data: Body | Mapping[str, Any] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """Send one request as it is; RetriableError when the connection broke."""
        payload = data() if callable(data) else data
        try:
            with self._readable_errors(url):
                response: requests.Response = self.session.request(
                    method,
                    url,
                    data=payload,
                    headers=dict(headers or {}),
                    stream=stream,
                    verify=self.verify,
                    timeout=(self.access.connect_timeout_s, self.access.read_timeout_s),
                    # The node's metadata service answers on the node alone: a proxy would be another node.
                    proxies={"no_proxy": "*"} if "//169.254." in url else None,
                    auth=_keep_header,  # else requests looks into ~/.netrc and overwrites ours
                )
        finally:
            if isinstance(payload, _Closable):  # a body that was not read to its end keeps a file open
                payload.close()
        return response

    @contextlib.contextmanager
    def _readable_errors(self, url: str) -> Iterator[None]:
        """Turn the errors of requests into RetriableError, or RegistryError where a retry cannot help."""
        try:
            yield
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise RegistryError(
                    f"{self.host}: its certificate is not trusted; give the CA file, or check the host name"
                ) from None
            raise RetriableError(_reason(error)) from None
        except requests.exceptions.TooManyRedirects:
            raise RegistryError(f"{_short(url)}: too many redirects; check the registry's address") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
            raise RegistryError(f"{_short(url)}: the registry sent an address that cannot be used") from None
        except (requests.exceptions.RequestException, OSError) as error:
            raise RetriableError(_reason(error)) from None

    def _probe(self) -> str:
        """Return "https" if the registry uses TLS, else "http"."""
        try:
            self.plain("GET", f"https://{self.host}/v2/")
        except RetriableError:
            return "http"
        return "https"


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class _Adapter(HTTPAdapter):
    """Reads bodies in large blocks (16 kB at a time costs as much CPU as TLS), and bounds all but blobs."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, blocksize=READ_BYTES)

    def send(
        self, request: requests.PreparedRequest, stream: bool = False, *args: Any, **options: Any
    ) -> requests.Response:
        response = super().send(request, stream, *args, **options)
        if not stream or response.status_code not in {200, 206}:
            response.raw = _BoundedBody(response.raw, _short(response.url))
        return response


class _BoundedBody:
    """The raw body of a response, of which at most MOST_BODY_BYTES are read, decoded."""

    def __init__(self, raw: Any, where: str):
        self._raw, self._where = raw, where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, *args: Any, **options: Any) -> Iterator[bytes]:
        """Yield the body; RegistryError when it is longer."""
        left = MOST_BODY_BYTES
        for chunk in self._raw.stream(*args, **options):
            left -= len(chunk)
            if left < 0:
                self._raw.close()
                raise RegistryError(
                    f"{self._where}: answered with more than {MOST_BODY_BYTES >> 20} MiB;"
                    " expected a manifest, a token or an error message"
                )
            yield chunk


def raise_if_busy(response: requests.Response) -> None:
    """Raise RetriableError for a status that asks to try again, with the registry's error message."""
    if response.status_code in RETRIED:  # a body that is wanted must not be read here
        raise_if_retriable(response, f" {response.reason}{explain(response)}")


def unexpected(response: requests.Response, what: str) -> RegistryError:
    """Return the error for a status that the protocol does not define."""
    return RegistryError(
        f"{what}: the registry answered {response.status_code} {response.reason}{explain(response)}"
    )


def explain(response: requests.Response) -> str:
    """Return the registry's error, ": CODE message", or "" without one."""
    try:
        first = response.json()["errors"][0]
        words = f"{first.get('code', '')} {first.get('message', '')}".strip()
    except (ValueError, LookupError, TypeError, AttributeError, requests.exceptions.RequestException):
        return ""
    return f": {redact(' '.join(words.split()))[:200]}" if words else ""


def _raise_refused(response: requests.Response, header: str | None) -> None:
    raise unexpected(response, _short(response.url))


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name in {"localhost", "[::1]"} or name.startswith("127.")


def _short(url: str) -> str:
    """Return host and path: upload URLs carry state of a kilobyte in their query."""
    parts = urlsplit(url)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}"


def _reason(error: Exception) -> str:
    """Return what went wrong without the library's nesting of it."""
    text = f"{type(error).__name__} {error}"
    known = {
        "timed out": "no answer in time",
        "Connection refused": "connection refused",
        "Connection reset": "connection reset",
        "Name or service not known": "host name not found",
        "Temporary failure in name resolution": "host name not found",
        "RemoteDisconnected": "connection closed without an answer",
        "IncompleteRead": "connection closed in the middle of the answer",
    }
    return next((plain for words, plain in known.items() if words in text), type(error).__name__)


def _keep_header(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
