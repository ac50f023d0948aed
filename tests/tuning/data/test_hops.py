"""Where requests for data go: names looked up once, addresses checked on every hop, proxies, redirects."""

import logging
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from runtime.errors import ConfigError, DataError
from runtime.net import DownloadLimits
from runtime.tuning.data.hops import Hops
from tests.faults.dataset_server import DatasetServer, Reply
from tests.faults.quirky_registry import QuirkyRegistry
from tests.faults.registry_tokens import make_certificate

LIMITS = DownloadLimits(stall_s=3)
Names = dict[str, list[str]]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The addresses of names, one look-up after the other; the last is for all later ones."""
    names: Names = {}
    look_up = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **options: object) -> object:
        answers = names.get(host, [host])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        addresses = answer.split()
        assert all(address.startswith("127.") for address in addresses) or len(addresses) == 1
        return [found for each in addresses for found in look_up(each, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return names


def read(url: str, *, allow_private: bool = True) -> bytes:
    hops = Hops(url, None, allow_private=allow_private, limits=LIMITS)
    with closing(hops), hops.get({}) as response:
        return response.read()


def test_name_is_looked_up_once_and_its_host_header_stays(named: Names) -> None:
    named["data.test"] = ["127.0.0.1", "169.254.169.254"]
    with DatasetServer({"/a": [Reply(b"rows")]}) as server:
        assert read(f"http://data.test:{server.port}/a") == b"rows"
        assert server.requests["/a"][0]["host"] == f"data.test:{server.port}"
    assert named["data.test"] == ["169.254.169.254"]


def test_every_connection_is_checked_anew(named: Names) -> None:
    """Also a redirect to the same name: its second answer is one that is never connected to."""
    named["data.test"] = ["127.0.0.1", "169.254.169.254"]
    with DatasetServer({"/a": [Reply(status=302, headers={"Location": "/b"})]}) as server:
        with pytest.raises(DataError, match=r"data.test: leads to 169.254.169.254, a link-local or metadata"):
            read(f"http://data.test:{server.port}/a")
        assert not server.requests["/b"]


def test_one_forbidden_address_among_several_is_enough(named: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.addresses.forbidden", lambda address, **named: address == "127.0.0.9")
    named["data.test"] = ["127.0.0.1 127.0.0.9"]
    with DatasetServer({"/a": [Reply(b"rows")]}) as server:
        with pytest.raises(DataError, match=r"data.test: leads to 127.0.0.9"):
            read(f"http://data.test:{server.port}/a")
        assert not server.requests


def test_next_address_is_tried(named: Names) -> None:
    named["data.test"] = ["127.9.9.9 127.0.0.1"]
    with DatasetServer({"/a": [Reply(b"rows")]}) as server:
        assert read(f"http://data.test:{server.port}/a") == b"rows"


def test_private_addresses_of_names_are_a_choice(named: Names) -> None:
    named["data.test"] = ["127.0.0.1"]
    with pytest.raises(DataError, match=r"data.test: leads to the private address 127.0.0.1"):
        read("http://data.test:1/a", allow_private=False)


def test_name_that_does_not_resolve_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(httpx.ConnectError, match=r"host gone.test cannot be resolved"):
        read("http://gone.test/a")


def test_certificate_is_about_the_name(named: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named |= {"localhost": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
    certificate = make_certificate(tmp_path, "server")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    server = QuirkyRegistry(certificate=certificate)
    try:
        assert read(f"https://localhost:{server.port}/v2/")
        with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
            read(f"https://other.test:{server.port}/v2/")
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://2852039166/latest", "leads to 169.254.169.254"),
        ("//0xa9fea9fe/x", "leads to 169.254.169.254"),
        ("http://[64:ff9b::a9fe:a9fe]/", "leads to 64:ff9b::a9fe:a9fe"),
        ("http://168.63.129.16:1/", "leads to 168.63.129.16"),
        ("http://[bad/", "not a valid address"),
        ("http://x:99999/", "not a valid address"),
        ("http://a%2fb/", "not a valid address"),
        ("file:///etc/passwd", "only http and https"),
    ],
)
def test_redirects_are_checked_by_their_text(named: Names, location: str, message: str) -> None:
    with (
        DatasetServer({"/a": [Reply(status=302, headers={"Location": location})]}) as server,
        pytest.raises(DataError, match=message),
    ):
        read(server.url("/a"))


@pytest.mark.parametrize("reply", [Reply(status=302), Reply(status=304, headers={"Location": "/b"})])
def test_what_redirects_nowhere_is_an_answer(named: Names, reply: Reply) -> None:
    hops = Hops("http://x/", None, allow_private=True, limits=LIMITS)
    with DatasetServer({"/a": [reply]}) as server:
        hops.url = server.url("/a")
        with closing(hops), hops.get({}) as response:
            assert response.status_code == reply.status


Through = Callable[[DatasetServer], None]


@pytest.fixture
def through(named: Names, monkeypatch: pytest.MonkeyPatch) -> Through:
    return lambda server: monkeypatch.setenv("http_proxy", f"http://user:hidden@127.0.0.1:{server.port}")


def test_proxy_looks_names_up_and_this_is_said(through: Through, caplog: pytest.LogCaptureFixture) -> None:
    """A machine behind a proxy often resolves nothing outside."""
    caplog.set_level(logging.INFO)
    with DatasetServer({"http://data.invalid/a": [Reply(b"rows")]}) as proxy:
        through(proxy)
        assert read("http://data.invalid/a") == b"rows"
        assert f"through the proxy 127.0.0.1:{proxy.port}, which decides what names lead to" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.parametrize(
    "host", ["168.63.129.16", "0xa83f8110", "metadata.google.internal", "[fd00:ec2::254]"]
)
def test_proxy_is_not_asked_for_what_an_address_says_by_itself(through: Through, host: str) -> None:
    with DatasetServer({}) as proxy:
        through(proxy)
        with pytest.raises(DataError, match="never fetched"):
            read(f"http://{host}/a")
        assert not proxy.requests


def test_private_addresses_cannot_be_forbidden_behind_a_proxy(through: Through) -> None:
    with DatasetServer({"http://8.8.8.8/a": [Reply(b"rows")]}) as proxy:
        through(proxy)
        with pytest.raises(ConfigError, match=r"allow_private_addresses is false, but the proxy"):
            read("http://data.invalid/a", allow_private=False)
        with pytest.raises(DataError, match="private address"):
            read("http://10.1.2.3/a", allow_private=False)
        assert read("http://8.8.8.8/a", allow_private=False) == b"rows"


def test_hosts_without_a_proxy_are_connected_to(
    through: Through, named: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    named["data.test"] = ["127.0.0.1"]
    monkeypatch.setenv("no_proxy", "data.test")
    with DatasetServer({}) as proxy, DatasetServer({"/a": [Reply(b"rows")]}) as server:
        through(proxy)
        assert read(f"http://data.test:{server.port}/a") == read(server.url("/a")) == b"rows"
        assert not proxy.requests


def test_proxy_of_another_kind_is_refused(named: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "ftp://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"the proxy .*127.0.0.1:1: expected an HTTP proxy"):
        read("http://data.invalid/a")
