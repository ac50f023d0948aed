"""Addresses that nothing from outside may lead to, in all their forms."""

import socket

import pytest

from runtime.addresses import forbidden, forbidden_literal, kind, literal, private, resolve

NEVER = [
    "169.254.169.254",
    "169.254.170.2",
    "168.63.129.16",
    "100.100.100.200",
    "100.64.0.1",
    "100.127.255.255",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1%eth0",
    "0.0.0.0",
    "0.0.0.1",
    "::",
    "224.0.0.1",
    "ff02::1",
    "255.255.255.255",
]
CARRYING = {
    "::ffff:169.254.169.254": "mapped",
    "::169.254.169.254": "compatible",
    "::ffff:0:169.254.169.254": "translated",
    "64:ff9b::a9fe:a9fe": "NAT64",
    "64:ff9b::643f:8110": None,  # 100.63.129.16: nobody's
    "64:ff9b::a83f:8110": "NAT64 of 168.63.129.16",
    "64:ff9b:1::a9fe:a9fe": "local NAT64 /96",
    "64:ff9b:1:a9fe:a9:fe00::": "local NAT64 /48",
    "64:ff9b:1:a9:fe:a9fe::": "local NAT64 /56",
    "64:ff9b:1:0:a9:fea9:fe00:0": "local NAT64 /64",
    "64:ff9b:1::808:808": None,
    "64:ff9b:1:808:8:800::": None,
    "2002:a9fe:a9fe::1": "6to4",
    "2002:6440:1::1": "6to4 of 100.64.0.1",
    "2002:808:808::1": None,
    "2001:0:a9fe:a9fe::1": "Teredo, its server",
    "2001:0:808:808::5601:5601": "Teredo, its client",
    "2001:db8::5efe:a9fe:a9fe": "ISATAP",
    "2001:db8::200:5efe:a9fe:a9fe": "ISATAP with a global address",
}
"""Addresses of IPv6, and how they carry a forbidden one of IPv4, if they do."""


@pytest.mark.parametrize("address", NEVER)
def test_metadata_services_and_link_local_addresses_are_forbidden(address: str) -> None:
    assert forbidden(address)


@pytest.mark.parametrize(("address", "how"), CARRYING.items(), ids=CARRYING)
def test_what_an_address_carries_counts(address: str, how: str | None) -> None:
    assert forbidden(address) is (how is not None)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "10.0.0.1", "fd00::1", "8.8.8.8", "100.63.0.1", "100.128.0.1", "2600::1"]
)
def test_other_addresses_are_not(address: str) -> None:
    assert not forbidden(address)


@pytest.mark.parametrize("address", ["100.64.0.1", "100.127.255.255", "2002:6440:1::1", "64:ff9b::6440:1"])
def test_shared_address_is_allowed_where_the_operator_names_the_host(address: str) -> None:
    assert forbidden(address)
    assert "provider's customers share (100.64.0.0/10)" in kind(address)
    assert not forbidden(address, named=True)
    assert forbidden_literal(address, named=True) is None


@pytest.mark.parametrize("address", [each for each in NEVER if not each.startswith(("100.64", "100.127"))])
def test_naming_allows_no_other_address(address: str) -> None:
    assert forbidden(address, named=True)
    assert kind(address) == "a link-local or metadata address"


def test_private_is_what_an_address_leads_to() -> None:
    within = ["127.0.0.1", "::1", "10.0.0.1", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::"]
    assert all(map(private, within))
    assert not any(map(private, ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2600::1"]))


SPELLINGS = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0XA9FEA9FE",
    "0251.0376.0251.0376",
    "0xa9.254.0251.254",
    "169.254.43518",
    "169.16689662",
    "169.254.169.254.",
    "１６９.254.169.254",
    "169。254。169。254",
    "①⑥⑨.254.169.254",
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_numbers_are_read_as_resolvers_read_them(host: str) -> None:
    assert literal(host) == forbidden_literal(host) == "169.254.169.254"


@pytest.mark.parametrize(
    "host", ["[::ffff:a9fe:a9fe]", "::ffff:a9fe:a9fe", "[fe80::1%25eth0]", "METADATA.google.internal."]
)
def test_other_forms_of_what_is_forbidden(host: str) -> None:
    assert forbidden_literal(host)


@pytest.mark.parametrize(
    "host", ["a.example", "127.0.0.1.example", "deadbeef.", "", "10.0.0.1", "cafe", "x.0x"]
)
def test_names_and_other_addresses_say_nothing_forbidden(host: str) -> None:
    assert forbidden_literal(host) is None


def test_every_address_of_a_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["10.0.0.1", "169.254.169.254", "10.0.0.1"]
    records = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: records)
    assert resolve("metadata.test", 80) == ("10.0.0.1", "169.254.169.254")


def test_what_is_no_name_does_not_resolve() -> None:
    with pytest.raises(socket.gaierror):
        resolve("a" * 64 + ".test", 80)
