"""Which addresses data may be fetched from: never link-local or cloud metadata, whoever asks.

A data URL comes from a manifest, and a redirect from whoever answers it; both are checked, by name before
connecting and by the connected peer afterwards. Does not know HTTP. Start at `check_host`.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from runtime.errors import DataError, TransientError

METADATA = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "fd00:ec2::254")))
"""Where clouds hand out a machine's own credentials (AWS and Azure and GCP, Alibaba, AWS over IPv6)."""


def check_url(url: str, *, allow_private: bool) -> None:
    """Raise DataError unless `url` is http(s) and its host resolves to allowed addresses only."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"{shown(url)}: only http and https addresses can be fetched")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except ValueError:
        raise DataError(f"{shown(url)}: not a valid address") from None
    except socket.gaierror:
        raise TransientError(f"{shown(url)}: host {parts.hostname} cannot be resolved") from None
    for *_, address in found:
        check_address(str(address[0]), url, allow_private=allow_private)


def check_address(address: str, url: str, *, allow_private: bool) -> None:
    """Raise DataError when `address`, which `url` led to, must not be spoken to."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    if ip.is_link_local or ip in METADATA or ip.is_multicast or ip.is_unspecified:
        raise DataError(f"{shown(url)}: leads to {ip}, a link-local or metadata address; it is never fetched")
    if not allow_private and (ip.is_private or ip.is_loopback):
        raise DataError(f"{shown(url)}: leads to the private address {ip}, and those are forbidden here")


def shown(url: str) -> str:
    """Return `url` without user, query and fragment, which may hold secrets."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "a malformed address"
    return f"{parts.scheme}://{host}{port}{parts.path}"
