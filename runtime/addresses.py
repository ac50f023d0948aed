"""Which network addresses are never connected to on behalf of data from outside.

Link-local addresses and the clouds' metadata services, which return a machine's credentials, in every form
that leads there. A client looks a name up once (`resolve`), checks every address found, and connects to one
of these: a second look-up could answer differently. Knows addresses, not who asks or what is fetched. Start
at `forbidden`.
"""

import ipaddress
import socket
import unicodedata
from collections.abc import Iterator

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_V6 = ipaddress.IPv6Network

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
METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})
"""Their names: what is refused where a proxy, and not this machine, looks names up."""
_NEVER = tuple(map(ipaddress.ip_network, ("0.0.0.0/8", "255.255.255.255/32")))
"""This host (RFC 1122), and every host."""
_SHARED = ipaddress.ip_network("100.64.0.0/10")
"""Between a provider and its customers (RFC 6598). Clouds have services for their machines there; but pods
of EKS with custom networking, hosts of Tailscale and Alibaba's registries have such addresses too, so that a
host which the operator names may be one. RFC 1918's and fc00::/7 are nobody's but the operator's."""
_LAST_32_BITS = tuple(
    map(
        _V6,
        (
            "::/96",  # compatible (RFC 4291); ::1 and :: are themselves
            "::ffff:0:0/96",  # mapped (RFC 4291)
            "::ffff:0:0:0/96",  # translated (RFC 7915)
            "64:ff9b::/96",  # NAT64 (RFC 6052)
        ),
    )
)
_LOCAL_NAT64 = _V6("64:ff9b:1::/48")
"""Divided by each operator into prefixes of 48, 56, 64 or 96 bits (RFC 8215)."""
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})


def forbidden(address: str, *, named: bool = False) -> bool:
    """Whether the numeric `address` is never connected to.

    Link-local, a metadata service, shared between a provider's customers, multicast or unspecified. IPv6
    forms that carry an IPv4 address count as that address too.

    named: the operator has named the host, which no data, redirect or answer has; a shared one is allowed.
    """
    return any(
        ip.is_link_local
        or ip in METADATA
        or ip.is_multicast
        or ip.is_unspecified
        or any(ip in network for network in _NEVER)
        or (ip in _SHARED and not named)
        for ip in meanings(_numeric(address))
    )


def kind(address: str) -> str:
    """Return what a forbidden `address`, or a metadata service's name, is, for messages."""
    if literal(address) is not None and not forbidden(address, named=True):
        return f"an address of a network that a provider's customers share ({_SHARED})"
    return "a link-local or metadata address"


def private(address: str) -> bool:
    """Whether the numeric `address`, or the IPv4 address that it carries, is of this machine or network."""
    outer, *carried = meanings(_numeric(address))
    return any(ip.is_private or ip.is_loopback for ip in carried or [outer])


def _numeric(address: str) -> _Address:
    return ipaddress.ip_address(address.partition("%")[0])


def meanings(ip: _Address) -> Iterator[_Address]:
    """Yield `ip` and every IPv4 address that a gateway or this machine may read in it."""
    yield ip
    if isinstance(ip, ipaddress.IPv6Address):
        yield from map(ipaddress.IPv4Address, dict.fromkeys(_embedded(ip)))


def _embedded(ip: ipaddress.IPv6Address) -> Iterator[int]:
    bits = int(ip)
    last = bits & 0xFFFFFFFF
    if bits > 1 and any(ip in network for network in _LAST_32_BITS):
        yield last
    if ip.sixtofour is not None:
        yield int(ip.sixtofour)
    if ip.teredo is not None:
        yield from map(int, ip.teredo)
    if bits >> 32 & 0xFFFFFFFF in _ISATAP:
        yield last
    if ip in _LOCAL_NAT64:  # RFC 6052, 2.2: bits 64 to 71 are no part of it
        rest = (bits >> 64 & 0xFFFFFFFF) << 32 | (bits >> 24 & 0xFFFFFFFF)  # bits 32 to 63, and 72 to 103
        readings = (last, rest >> 16 & 0xFFFFFFFF, rest >> 8 & 0xFFFFFFFF, rest & 0xFFFFFFFF)
        yield from (found for found in readings if found >> 24)  # zeros: the prefix is another


def literal(host: str) -> str | None:
    """Return the numeric address that `host` spells, None for a name.

    In every spelling that a resolver takes: octal, hexadecimal, fewer numbers, full-width digits, brackets, a
    dot at the end.
    """
    text = unicodedata.normalize("NFKC", host).replace("\u3002", ".").strip("[]").rstrip(".").lower()
    text = text.partition("%")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not text or not set(text) <= set("0123456789abcdefx."):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(text))
    except OSError:
        return None


def forbidden_literal(host: str, *, named: bool = False) -> str | None:
    """Return what `host` says by itself that is never connected to: an address, or a known name of one.

    named: the operator has named it, see `forbidden`.
    """
    address = literal(host)
    if address is not None:
        return address if forbidden(address, named=named) else None
    name = host.lower().rstrip(".")
    return name if name in METADATA_NAMES else None


def resolve(host: str, port: int) -> tuple[str, ...]:
    """Return the numeric addresses of `host`, each once, in the order to try them.

    Raises OSError for a name that does not resolve.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # no name at all: a label of 64 characters
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))
