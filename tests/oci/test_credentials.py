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
