"""Entries of Docker's configuration files: which registry each is for."""

from pathlib import Path

import pytest

from runtime.oci import Access
from runtime.oci.credentials import find
from tests.oci.conftest import encoded, write


@pytest.mark.parametrize(
    ("key", "registry", "repository", "matches"),
    [
        ("https://index.docker.io/v1/", "docker.io", "library/a", True),
        ("docker.io", "docker.io", "me/a", True),
        ("my.azurecr.io", "my.azurecr.io", "a", True),
        ("https://my.azurecr.io", "my.azurecr.io", "a", True),
        ("https://my.azurecr.io/v2/", "my.azurecr.io", "a", True),
        ("my.azurecr.io/team", "my.azurecr.io", "team/a", True),
        ("my.azurecr.io/team", "my.azurecr.io", "teams/a", False),
        ("*.azurecr.io", "my.azurecr.io", "a", True),
        ("my.azurecr.io", "my.azurecr.io.evil.net", "a", False),
        ("my.azurecr.io", "notmy.azurecr.io", "a", False),
    ],
)
def test_entry_is_used_for_its_own_registry_alone(
    tmp_path: Path, key: str, registry: str, repository: str, matches: bool
) -> None:
    config = write(tmp_path / "config.json", {"auths": {key: {"auth": encoded("u", "p")}}})
    found = list(find(registry, repository, Access(files=(config,))))
    assert bool(found) == matches


def test_longest_entry_wins_and_old_dockercfg_is_read(tmp_path: Path) -> None:
    table = {"r.io": {"auth": encoded("wide", "1")}, "r.io/team": {"auth": encoded("narrow", "2")}}
    config = write(tmp_path / ".dockercfg", table)
    (found,) = find("r.io", "team/a", Access(files=(config,)))
    assert (found.user, found.secret, found.source) == ("narrow", "2", str(config))


@pytest.mark.parametrize(
    "auth", ["%%%", encoded("only-a-user", "")[:-2], "AAAA", "cGxhaW4=", 7, {"a": 1}], ids=range(6)
)
def test_broken_auth_does_not_hide_good_fields(tmp_path: Path, auth: object) -> None:
    entry = {"auth": auth, "username": "u", "password": "p"}
    config = write(tmp_path / "config.json", {"auths": {"r.io": entry}})
    (found,) = find("r.io", "a", Access(files=(config,)))
    assert (found.user, found.secret, found.kind) == ("u", "p", "password")
    entry = {"auth": auth, "identitytoken": "refresh"}
    config = write(tmp_path / "config.json", {"auths": {"r.io": entry}})
    (found,) = find("r.io", "a", Access(files=(config,)))
    assert (found.secret, found.kind) == ("refresh", "identity")


def test_registry_token_is_a_credential_of_its_own(tmp_path: Path) -> None:
    entry = {"auth": encoded("u", "p"), "registrytoken": "ready"}
    config = write(tmp_path / "config.json", {"auths": {"r.io": entry}})
    (found,) = find("r.io", "a", Access(files=(config,)))
    assert (found.secret, found.kind) == ("ready", "token")
    assert "ready" not in f"{found} {found!r}"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"auths": {"r.io": {"auth": "%%%"}}}, "not base64 of user:password"),
        ({"credHelpers": {"r.io": "not-there"}}, "docker-credential-not-there (named in"),
        ({"credsStore": "not-there"}, "is not installed"),
        ({"credHelpers": {"r.io": "../bin/sh"}}, "not a plain name"),
        ({"credHelpers": {"r.io": "forbidden"}}, "cannot be run (Permission denied)"),
        ({"credHelpers": {"r.io": "empty"}}, "has nothing for r.io"),
        ({"credHelpers": {"r.io": "nested"}}, "has nothing for r.io"),
        ([], "not a JSON object"),
    ],
)
def test_what_cannot_be_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: object, words: str
) -> None:
    programs = {
        "forbidden": ("", 0o644),
        "empty": ("exit 1", 0o755),
        "nested": ("printf '[%.0s' $(seq 99999)", 0o755),
    }
    for name, (line, mode) in programs.items():
        program = tmp_path / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(mode)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    skipped: list[str] = []
    good = write(tmp_path / "good.json", {"auths": {"r.io": {"auth": encoded("u", "p")}}})
    files = (write(tmp_path / "config.json", document), good)
    assert [found.user for found in find("r.io", "a", Access(files=files), skipped=skipped)] == ["u"]
    assert len(skipped) == 1
    assert words in skipped[0]


def test_file_that_nests_too_deep_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    skipped: list[str] = []
    assert not list(find("r.io", "a", Access(files=(tmp_path / "config.json",)), skipped=skipped))
    assert "not JSON" in skipped[0]
