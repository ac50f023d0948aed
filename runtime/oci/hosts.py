"""Which host an address means, and whether it is this machine.

The default port, letter case and a trailing dot make no difference. Pure text: resolves nothing.
Start at `same_host`.
"""

import ipaddress
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def host_of(url: str) -> tuple[str, int | None]:
    """Return the host of `url` and its port, None for the scheme's default; ValueError when malformed."""
    parts = urlsplit(url)
    port = None if parts.port == _PORTS.get(parts.scheme) else parts.port
    return (parts.hostname or "").removesuffix("."), port


def same_host(one: str, other: str) -> bool:
    """Whether two URLs lead to the same host and port."""
    return host_of(one) == host_of(other)


def is_loopback(host: str) -> bool:
    """Whether `host`, with or without a port, is this machine: localhost, 127.0.0.0/8 or ::1."""
    name = host if host.count(":") > 1 and "[" not in host else urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.removesuffix(".") == "localhost"
