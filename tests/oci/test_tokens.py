"""Token servers: where they may be, where credentials follow them, and what they answer."""

import ipaddress
import json
import socket
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError
from tests.faults.quirky_registry import PASSWORD, TOKEN, USER, Answer, Quirks, QuirkyRegistry
from tests.faults.registry_tokens import make_certificate
from tests.oci.conftest import Start, docker_config, encoded, fresh, quick, write

QUIRKY = {"user": USER, "password": PASSWORD}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Addresses of names; what is not in it resolves as ever."""
    names: dict[str, str] = {}
    look_up = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **options: object) -> object:
        return look_up(names.get(host, host), *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "2852039166",
        "[::ffff:169.254.169.254]",
        "[fe80::1]",
        "168.63.129.16",
        "metadata.test",
        "METADATA.test.",
    ],
)
def test_token_servers_at_metadata_addresses_are_refused(
    start: Start, tmp_path: Path, named: dict[str, str], host: str
) -> None:
    """Also after resolution; nothing is sent, or this test would take as long as a connection."""
    named |= {"metadata.test": "169.254.169.254", "metadata.test.": "169.254.169.254"}
    server = start(auth="bearer")
    server.realm = f"https://{host}/latest/meta-data"
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    with pytest.raises(RegistryError, match="link-local or metadata address"):
        oci.check_push(fresh(server.host, "x"), access=access)


def test_name_that_leads_to_a_metadata_address_gets_no_byte(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(auth="bearer")
    other = start()
    server.realm = f"http://localhost:{other.port}/token"
    reference, access = (
        fresh(server.host, "x"),
        quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY)),
    )
    monkeypatch.setattr("runtime.addresses.METADATA", {ipaddress.ip_address("127.0.0.1")})
    with pytest.raises(RegistryError, match="link-local or metadata address"):
        oci.check_push(reference, access=access)
    assert not other.seen


def test_shared_network_is_for_the_registry_that_the_operator_names(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = start(auth="bearer"), start()
    named = f"localhost:{server.port}"
    access = quick(docker_config(tmp_path / "c.json", named, **QUIRKY), insecure=True)
    monkeypatch.setattr("runtime.addresses._SHARED", ipaddress.ip_network("127.0.0.0/8"))
    server.realm = f"http://localhost:{server.port}/token"
    oci.check_push(fresh(named, "x"), access=access)
    assert server.seen
    server.realm = f"http://127.0.0.1:{other.port}/token"
    with pytest.raises(RegistryError, match="a network that a provider's customers share"):
        oci.check_push(fresh(named, "x"), access=access)
    assert not other.seen


def test_name_is_looked_up_once_for_each_connection(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer would be another address: the one that was checked is connected to."""
    server, answers = start(auth="bearer"), []
    look_up = socket.getaddrinfo

    def rebinding(host: str, *arguments: object, **options: object) -> object:
        if host == "localhost":
            answers.append("127.0.0.1" if not answers else "169.254.169.254")
            host = answers[-1]
        return look_up(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    server.realm = f"http://localhost:{server.port}/token"
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    oci.check_push(fresh(server.host, "x"), access=access)
    assert answers == ["127.0.0.1"]


def test_next_address_of_a_name_is_tried(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, look_up = start(auth="bearer"), socket.getaddrinfo

    def two(host: str, *arguments: object, **options: object) -> object:
        names = ["127.9.9.9", "127.0.0.1"] if host == "localhost" else [host]
        return [found for name in names for found in look_up(name, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    server.realm = f"http://localhost:{server.port}/token"
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    oci.check_push(fresh(server.host, "x"), access=access)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", ["password", "identity"])
def test_credentials_follow_no_redirect_of_the_token_server_elsewhere(
    start: Start, tmp_path: Path, status: int, kind: str
) -> None:
    server, other = start(auth="bearer"), start()
    server.token_answer = lambda form, headers: (status, [("Location", f"http://{other.host}/token")], b"")
    entry = {"auth": encoded(USER, PASSWORD)} if kind == "password" else {"identitytoken": "refresh-ok"}
    config = write(tmp_path / "c.json", {"auths": {server.host: entry}})
    with pytest.raises(RegistryError, match="redirects the login"):
        oci.check_push(fresh(server.host, "x"), access=quick(config))
    assert not other.seen


def test_token_server_may_redirect_within_its_host(start: Start, tmp_path: Path) -> None:
    server = start(auth="bearer")
    server.realm = f"http://{server.host}/token?old"
    give = server.token_answer

    def answer(form: dict[str, list[str]], headers: dict[str, str]) -> Answer:
        moved = "moved" in form
        return give(form, headers) if moved else (307, [("Location", "/token?moved=1")], b"")

    server.token_answer = answer
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    oci.check_push(fresh(server.host, "x"), access=access)


def test_registry_with_tls_may_not_ask_for_a_login_without(tmp_path: Path, start: Start) -> None:
    certificate = make_certificate(tmp_path, "registry")
    server, plain = QuirkyRegistry(Quirks(auth="bearer"), certificate=certificate), start()
    server.realm = f"http://registry.test:{plain.port}/token"
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY), ca_file=certificate[0])
    with pytest.raises(RegistryError, match="plain HTTP"):
        oci.check_push(fresh(server.host, "x"), access=access)
    server.realm = f"https://u:p@{server.host}/token"
    with pytest.raises(RegistryError, match="cannot be used"):
        oci.check_push(fresh(server.host, "x"), access=access)
    server.realm = f"https://{server.host}/token"
    oci.check_push(fresh(server.host, "x"), access=access)
    server.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"token": 1}',
        b'{"token": ""}',
        b'{"token": "a\\r\\nX: y"}',
        b'{"token": "\\u20ac"}',
        b"[" * 100_000,
        b'{"token": "a", "expires_in": "soon"}',
    ],
    ids=range(8),
)
def test_answer_without_a_token_is_one_line(start: Start, tmp_path: Path, body: bytes) -> None:
    server = start(auth="bearer")
    server.token_answer = lambda form, headers: (200, [], body)
    with pytest.raises(RegistryError, match="sent no token") as caught:
        oci.check_push(
            fresh(server.host, "x"), access=quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("expires_in", [0, -1, 1e400, 1e12, 0.001])
def test_odd_lifetime_of_a_token_does_no_harm(start: Start, tmp_path: Path, expires_in: float) -> None:
    server = start(auth="bearer")
    reply = json.dumps({"token": TOKEN, "expires_in": expires_in}).encode()
    server.token_answer = lambda form, headers: (200, [], reply)
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    oci.check_push(fresh(server.host, "x"), access=access)


@pytest.mark.parametrize("expires_in", [0.001, 300])
def test_token_that_never_works_ends_the_push(start: Start, tmp_path: Path, expires_in: float) -> None:
    server = start(auth="bearer")
    reply = json.dumps({"token": "wrong", "expires_in": expires_in}).encode()
    server.token_answer = lambda form, headers: (200, [], reply)
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    with pytest.raises(RegistryError, match="may not pull,push"):
        oci.check_push(fresh(server.host, "x"), access=access)
