"""Logging in, by every way a pod or a laptop holds credentials (fault tests 33 and 34), and refusals."""

import json
import logging
import stat
import time
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError
from runtime.oci import Access
from runtime.oci.credentials import NULL_GUID, find
from tests.faults.quirky_registry import PASSWORD, TOKEN, USER
from tests.oci.conftest import AzureLike, Start, Started, docker_config, encoded, files, fresh, quick, write

pytestmark = pytest.mark.system


def helper(folder: Path, name: str, answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\nread server\necho '{json.dumps(answer)}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_34_auth_entry_logs_in(azure: AzureLike, tmp_path: Path) -> None:
    oci.check_push(fresh(azure.host, "a"), access=quick(docker_config(tmp_path / "config.json", azure.host)))
    assert set(azure.tokens.grants) == {"basic pusher"}


@pytest.mark.parametrize(
    "entry",
    [
        {"auth": encoded(NULL_GUID, ""), "identitytoken": "refresh-ok"},  # az acr login
        {"auth": encoded(NULL_GUID, "refresh-ok")},  # docker login with the token as password
        {"username": NULL_GUID, "password": "refresh-ok"},  # kubectl create secret docker-registry
    ],
)
def test_34_refresh_token_logs_in_and_is_never_sent_as_a_password(
    azure: AzureLike, tmp_path: Path, entry: dict[str, str]
) -> None:
    config = write(tmp_path / "config.json", {"auths": {azure.host: entry}})
    oci.check_push(fresh(azure.host, "a"), access=quick(config))
    assert set(azure.tokens.grants) == {"refresh"}


@pytest.mark.parametrize("shape", ["credHelpers", "credsStore"])
@pytest.mark.parametrize(
    ("user", "secret", "grant"), [("pusher", "s3cret", "basic pusher"), ("<token>", "refresh-ok", "refresh")]
)
def test_34_credential_helper_logs_in(
    azure: AzureLike,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    user: str,
    secret: str,
    grant: str,
) -> None:
    helper(tmp_path / "bin", "vault", {"Username": user, "Secret": secret}, monkeypatch)
    value = {azure.host: "vault"} if shape == "credHelpers" else "vault"
    config = write(tmp_path / "config.json", {"auths": {azure.host: {}}, shape: value})
    oci.check_push(fresh(azure.host, "a"), access=quick(config))
    assert set(azure.tokens.grants) == {grant}


def test_34_mounted_secrets_are_tried_one_after_the_other(azure: AzureLike, tmp_path: Path) -> None:
    """As Kubernetes mounts them: links into a hidden folder, one secret for another registry among them."""
    folder = tmp_path / "config.d"
    hidden = folder / "..2026_11_24"
    write(hidden / "a-other.json", {"auths": {"other.io": {"auth": encoded("x", "y")}}})
    write(hidden / "b-stale.json", {"auths": {azure.host: {"auth": encoded("pusher", "last-year")}}})
    write(hidden / "c-good.json", {"auths": {f"https://{azure.host}": {"auth": encoded("pusher", "s3cret")}}})
    (folder / "..data").symlink_to(hidden.name)
    for name in ("a-other.json", "b-stale.json", "c-good.json"):
        (folder / name).symlink_to(f"..data/{name}")
    (folder / "broken.json").write_text("not json")
    oci.check_push(fresh(azure.host, "a"), access=quick(folder))
    assert azure.tokens.grants[:2] == ["basic pusher", "basic pusher"]


def test_anonymous_may_pull_where_the_registry_lets_it(
    azure: AzureLike, adapter: Path, tmp_path: Path
) -> None:
    reference = fresh(azure.host, "public")
    oci.push(adapter, reference, access=quick(docker_config(tmp_path / "config.json", azure.host)))
    azure.tokens.grants.clear()
    oci.pull(reference, tmp_path / "back", access=quick())
    assert set(azure.tokens.grants) == {"anonymous"}


@pytest.mark.parametrize(
    ("user", "password", "message"),
    [("pusher", "wr0ng-pass", "login refused with 401"), ("reader", "r", "may not pull,push")],
)
def test_33_refused_login_is_known_at_once_and_names_user_and_file(
    azure: AzureLike, tmp_path: Path, user: str, password: str, message: str
) -> None:
    config = docker_config(tmp_path / "config.json", azure.host, user, password)
    started = time.monotonic()
    with pytest.raises(RegistryError, match=message) as caught:
        oci.check_push(fresh(azure.host, "a"), access=Access(files=(config,)))
    assert time.monotonic() - started < 10  # 0.2; six tries wait longer
    message = str(caught.value)
    assert user in message
    assert str(config) in message
    assert azure.host in message
    assert password not in message or password == "r"


def test_33_wrong_password_at_a_basic_registry_is_known_at_once(
    password_registry: Started, tmp_path: Path
) -> None:
    config = docker_config(tmp_path / "config.json", password_registry.host, "pusher", "wr0ng-pass")
    started = time.monotonic()
    with pytest.raises(RegistryError, match=r"'pusher' from .*config.json") as caught:
        oci.check_push(fresh(password_registry.host, "a"), access=Access(files=(config,)))
    assert time.monotonic() - started < 10
    assert "wr0ng-pass" not in str(caught.value)


def test_missing_credentials_are_reported(password_registry: Started) -> None:
    with pytest.raises(RegistryError, match="no credentials found"):
        oci.check_push(fresh(password_registry.host, "a"), access=quick())


def test_token_is_renewed_before_it_expires(
    azure: AzureLike, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token message how long it lives; ours is renewed while it still works."""
    azure.tokens.life_s = 1
    clock = [0.0]
    monkeypatch.setattr("runtime.oci.auth.time.monotonic", lambda: clock.append(clock[-1] + 0.5) or clock[-1])
    oci.push(
        adapter, fresh(azure.host, "a"), access=quick(docker_config(tmp_path / "config.json", azure.host))
    )
    assert len(azure.tokens.issued) > 3
    assert azure.front.count("PATCH|PUT", "/v2/") > 0
    uploads = [s for s in azure.front.seen if s.method in {"PATCH", "PUT"}]
    assert all(s.status in {201, 202} for s in uploads)


def test_56_no_secret_reaches_a_log_line_or_a_message(
    azure: AzureLike, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    canary = "canary-s3cr3t-0123456789"
    bad = docker_config(tmp_path / "bad/config.json", azure.host, "pusher", canary)
    good = docker_config(tmp_path / "good/config.json", azure.host)
    azure.front.fault("PATCH|PUT", "/v2/", "status", status=503, times=2)
    oci.push(adapter, fresh(azure.host, "a"), access=quick(bad, good))
    with pytest.raises(RegistryError) as caught:
        oci.check_push(fresh(azure.host, "a"), access=quick(bad))
    text = (
        caplog.text + str(caught.value) + repr(caught.value) + repr(list(find(azure.host, "a", quick(bad))))
    )
    assert "503" in text
    for secret in (canary, encoded("pusher", canary), "s3cret", encoded("pusher", "s3cret"), "eyJ"):
        assert secret not in text


QUIRKY = {"user": USER, "password": PASSWORD}


@pytest.mark.parametrize("wanted", ["basic", "bearer"])
@pytest.mark.parametrize(
    "offered",
    [
        ["BASIC", "BEARER"],
        ["BEARER", "BASIC"],
        ["BASIC, BEARER"],
        ["BEARER, BASIC"],
        ["Negotiate", "BASIC", "BEARER"],
        ["Negotiate YII=, BEARER, BASIC"],
    ],
    ids=" | ".join,
)
def test_every_challenge_is_tried_in_any_order(
    start: Start, tmp_path: Path, offered: list[str], wanted: str
) -> None:
    """A registry offers two ways to log in, one or the other of which works."""
    server = start(auth=wanted)
    words = {
        "BASIC": 'Basic realm="R, S"',
        "BEARER": f'Bearer realm="http://{server.host}/token",service="r"',
    }
    for word, challenge in words.items():
        offered = [each.replace(word, challenge) for each in offered]
    server.challenges = offered
    oci.check_push(
        fresh(server.host, "x"), access=quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    )


def test_useless_challenge_is_shown(start: Start) -> None:
    server = start()
    server.challenges = ["Negotiate"]
    with pytest.raises(RegistryError, match=r"401 without a usable WWW-Authenticate.*Negotiate"):
        oci.check_push(fresh(server.host, "x"), access=quick())


def test_bearer_challenge_without_a_realm_is_named(start: Start, tmp_path: Path) -> None:
    """No login can help, so none is advised."""
    server = start()
    server.challenges = ['Bearer service="r"']
    for access in (quick(), quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))):
        with pytest.raises(RegistryError, match="token without the realm") as caught:
            oci.check_push(fresh(server.host, "x"), access=access)
        assert "log in" not in str(caught.value)


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_registry_that_hides_what_is_private_is_asked_at_its_base(
    start: Start, adapter: Path, tmp_path: Path, status: int, auth: str
) -> None:
    server = start(auth=auth, anonymous=status)
    access = quick(docker_config(tmp_path / "c.json", server.host, **QUIRKY))
    reference = fresh(server.host, "x")
    oci.push(adapter, reference, access=access)
    assert files(oci.pull(reference, tmp_path / "back", access=access)) == files(adapter)
    missing = r"no such image|no credentials found|without credentials: login refused with 401"
    with pytest.raises(RegistryError, match=missing):
        oci.pull(reference, tmp_path / "anonymous", access=quick())


def test_registry_that_is_open_is_asked_at_its_base_once(start: Start, adapter: Path) -> None:
    server = start()
    oci.push(adapter, fresh(server.host, "x"), access=quick())
    assert len(server.find("GET", "^/v2/$")) <= 2  # one of them to see whether it uses TLS


def test_forbidden_credentials_are_followed_by_the_next(start: Start, tmp_path: Path) -> None:
    """One cloud's registry answers 403 to a password that has expired."""
    server = start(auth="basic")
    stale = docker_config(tmp_path / "a.json", server.host, USER, "last-year")
    good = docker_config(tmp_path / "b.json", server.host, **QUIRKY)
    server.forbids = f"Basic {encoded(USER, 'last-year')}"
    oci.check_push(fresh(server.host, "x"), access=quick(stale, good))
    with pytest.raises(RegistryError, match=r"forbidden \(403: DENIED expired\).*fix the push secret"):
        oci.check_push(fresh(server.host, "x"), access=quick(stale))


def test_registry_token_is_sent_as_it_is(start: Start, tmp_path: Path) -> None:
    server = start(auth="bearer")
    config = write(tmp_path / "c.json", {"auths": {server.host: {"registrytoken": TOKEN}}})
    oci.check_push(fresh(server.host, "x"), access=quick(config))
    assert not server.find("GET|POST", "/token")
    config = write(tmp_path / "c.json", {"auths": {server.host: {"registrytoken": "expired"}}})
    with pytest.raises(RegistryError, match=r"the registry token from .*c\.json") as caught:
        oci.check_push(fresh(server.host, "x"), access=quick(config))
    assert "expired" not in str(caught.value)


def test_missing_helper_and_broken_files_are_named_in_the_error(start: Start, tmp_path: Path) -> None:
    server = start(auth="basic")
    helper = write(tmp_path / "a.json", {"credHelpers": {server.host: "not-there"}})
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(RegistryError) as caught:
        oci.check_push(fresh(server.host, "x"), access=quick(helper, tmp_path / "b.json"))
    assert "docker-credential-not-there" in str(caught.value)
    assert "b.json: not JSON" in str(caught.value)
