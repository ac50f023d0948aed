"""Addresses that nothing from outside may lead to, in all their forms."""

import socket

import pytest

from runtime.addresses import forbidden, forbidden_at

METADATA = [
    "169.254.169.254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::169.254.169.254",
    "168.63.129.16",
    "fd00:ec2::254",
    "fd20:ce::254",
    "100.100.100.200",
    "192.0.0.192",
    "169.254.170.2",
    "fe80::1%eth0",
    "0.0.0.0",
    "::",
    "224.0.0.1",
]


@pytest.mark.parametrize("address", METADATA)
def test_metadata_services_and_link_local_addresses_are_forbidden(address: str) -> None:
    assert forbidden(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "10.0.0.1", "fd00::1", "8.8.8.8", "64:ff9b::808:808"]
)
def test_other_addresses_are_not(address: str) -> None:
    assert not forbidden(address)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "2852039166", "0xa9fea9fe", "169.254.43518", "::ffff:a9fe:a9fe"]
)
def test_numbers_are_read_as_the_system_reads_them(host: str) -> None:
    assert forbidden_at(host, 80)


def test_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **options: object) -> object:
        if host == "gone.test":
            raise socket.gaierror
        addresses = ["10.0.0.1", "169.254.169.254"] if host == "metadata.test" else ["10.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert forbidden_at("metadata.test", 80) == "169.254.169.254"
    assert forbidden_at("fine.test", 80) is None
    assert forbidden_at("gone.test", 80) is None
