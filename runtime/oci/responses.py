"""What came back, or did not: a request's failure becomes one line that a user can act on.

Bodies are read up to a limit; messages of registries are redacted. Knows requests' errors, not what was asked
for. Start at `readable_errors`.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import requests
import urllib3

from runtime.errors import ConfigError, RegistryError
from runtime.net import RETRIED, RetriableError, raise_if_retriable, shown_proxy
from runtime.redaction import redact

MAX_BODY_BYTES = 4 << 20
"""Manifests are at most this large (Azure's and the specification's limit), tokens and errors far smaller."""
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3}[^'\")]*)")


def raise_if_busy(response: requests.Response) -> None:
    """Raise RetriableError for a status that asks to try again, with the registry's error message."""
    if response.status_code in RETRIED:  # a body that is wanted must not be read here
        raise_if_retriable(response, f" {response.reason}{explain(response)}")


def succeeded(response: requests.Response) -> bool:
    """Whether the status is any of success: registries differ in which."""
    return 200 <= response.status_code < 300


def unexpected(response: requests.Response, what: str) -> RegistryError:
    """Return the error for a status that the protocol does not define."""
    return RegistryError(
        f"{what}: the registry answered {response.status_code} {response.reason}{explain(response)}"
    )


def explain(response: requests.Response) -> str:
    """Return the registry's error, ": CODE message", or "" without one."""
    try:
        read_body(response, response.url)
        first = response.json()["errors"][0]
        words = f"{first.get('code', '')} {first.get('message', '')}".strip()
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        RetriableError,
    ):
        return ""
    return f": {redact(' '.join(words.split()))[:200]}" if words else ""


def read_body(response: requests.Response, what: str) -> None:
    """Read the body, at most MAX_BODY_BYTES, so that `response.content` has it; RegistryError beyond."""
    if isinstance(response.raw, io.BytesIO):
        return
    try:
        data = response.raw.read(MAX_BODY_BYTES + 1, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        response.close()
        raise RetriableError(f"connection lost in the answer ({type(error).__name__})") from None
    if len(data) > MAX_BODY_BYTES:
        response.close()
        raise RegistryError(
            f"{short(what)}: answered with more than {MAX_BODY_BYTES >> 20} MiB;"
            " expected a manifest, a token or an error message"
        )
    response.raw = io.BytesIO(data)


@contextlib.contextmanager
def readable_errors(url: str, proxy: str | None) -> Iterator[None]:
    """Turn the errors of requests into RetriableError, or a Failure where a retry cannot help.

    proxy: address of the proxy that the request goes through.
    """
    host, through = urlsplit(url).netloc.rpartition("@")[2], shown_proxy(proxy)
    try:
        yield
    except requests.exceptions.ProxyError as error:
        refused = _TUNNEL.search(str(error))
        if refused and refused[1][0] == "4":
            raise RegistryError(
                f"{host}: the proxy {through} refused the connection ({refused[1].strip()});"
                " check HTTPS_PROXY and NO_PROXY"
            ) from None
        reason = f"it answered {refused[1].strip()}" if refused else _reason(error)
        raise RetriableError(f"the proxy {through}: {reason}") from None
    except requests.exceptions.InvalidProxyURL:
        raise ConfigError(f"the proxy {through} is no address; check HTTPS_PROXY and HTTP_PROXY") from None
    except requests.exceptions.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise RegistryError(
                f"{host}: its certificate is not trusted; give the CA file, or check the host name"
            ) from None
        raise RetriableError(_reason(error)) from None
    except (requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema) as error:
        if proxy is not None and "SOCKS" in str(error):
            raise ConfigError(f"the proxy {through}: SOCKS is not supported; use an HTTP proxy") from None
        raise RegistryError(f"{short(url)}: the registry sent an address that cannot be used") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader, UnicodeError):
        raise RegistryError(f"{short(url)}: the registry sent an address that cannot be used") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise RetriableError(_reason(error)) from None


def refused_by_proxy(url: str, response: requests.Response, proxy: str | None) -> RegistryError:
    """Return the error for a 407: the proxy wants credentials of its own."""
    host = urlsplit(url).netloc
    return RegistryError(
        f"{host}: the proxy {shown_proxy(proxy)} wants credentials ({response.status_code} {response.reason})"
        "; put them into HTTP_PROXY and HTTPS_PROXY"
    )


def short(url: str) -> str:
    """Return host and path: upload URLs carry state of a kilobyte in their query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a malformed address"
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}"


def _reason(error: Exception) -> str:
    """Return what went wrong without the library's nesting of it."""
    text = f"{type(error).__name__} {error}"
    known = {
        "timed out": "no answer in time",
        "Connection refused": "connection refused",
        "Connection reset": "connection reset",
        "Broken pipe": "connection reset",
        "Name or service not known": "host name not found",
        "Temporary failure in name resolution": "host name not found",
        "RemoteDisconnected": "connection closed without an answer",
        "IncompleteRead": "connection closed in the middle of the answer",
        "No route to host": "no route to the host",
        "Network is unreachable": "network unreachable",
    }
    return next((plain for words, plain in known.items() if words in text), type(error).__name__)
