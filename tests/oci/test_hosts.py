"""The same host, however it is written, and this machine."""

import pytest

from runtime.oci.hosts import is_loopback, same_host


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("https://r.io/a", "https://R.IO:443/b?c", True),
        ("https://r.io/", "https://r.io./", True),
        ("http://r.io:80/", "http://r.io/", True),
        ("https://u:p@r.io/", "https://r.io/", True),
        ("https://r.io:5000/", "https://r.io/", False),
        ("https://r.io:80/", "https://r.io/", False),
        ("https://r.io/", "https://r.io.evil.net/", False),
        ("https://r.io/", "https://r.io@evil.net/", False),
        ("https://[::1]:5000/", "https://[::1]:5000/x", True),
    ],
)
def test_hosts_are_compared_as_they_are_meant(one: str, other: str, expected: bool) -> None:
    assert same_host(one, other) == expected


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000", "::1"]
)
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["127.evil.net", "127.0.0.1.evil.net:5000", "localhost.evil.net", "10.0.0.1", "r.io", ""]
)
def test_other_machines(host: str) -> None:
    assert not is_loopback(host)
