"""Which network addresses are never connected to on behalf of data from outside.

Link-local addresses and the clouds' metadata services, which return a machine's credentials, in every form
that leads there. Knows addresses, not who asks or what is fetched. Start at `forbidden`.
"""

import ipaddress
import socket
from collections.abc import Iterator

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",  # AWS, Azure, GCP and most others
            "168.63.129.16",  # Azure's wire server
            "100.100.100.200",  # Alibaba
            "192.0.0.192",  # Oracle
            "fd00:ec2::254",  # AWS over IPv6
            "fd20:ce::254",  # GCP over IPv6
        ),
    )
)
"""Metadata services that return credentials of the machine that asks."""
_NAT64 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48")))
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")


def forbidden(address: str) -> bool:
    """Whether the numeric `address` is link-local, a metadata service, multicast or unspecified.

    IPv6 forms that carry an IPv4 address count as that address too.
    """
    return any(
        ip.is_link_local or ip in METADATA or ip.is_multicast or ip.is_unspecified
        for ip in meanings(ipaddress.ip_address(address.partition("%")[0]))
    )


def meanings(ip: _Address) -> Iterator[_Address]:
    """Yield `ip` and the IPv4 address inside it: mapped, compatible, NAT64 (RFC 6052), 6to4 (RFC 3056)."""
    yield ip
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped or ip.sixtofour:
            yield ip.ipv4_mapped or ip.sixtofour  # type: ignore[misc]  # one of them is set
        elif any(ip in network for network in _NAT64) or (ip in _V4_COMPATIBLE and int(ip) > 1):
            yield ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)


def forbidden_at(host: str, port: int) -> str | None:
    """Return an address that `host` resolves to and that is forbidden, None when there is none.

    A name that does not resolve here returns None: the connection reports that, or a proxy resolves it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return next((str(address[0]) for *_, address in found if forbidden(str(address[0]))), None)
