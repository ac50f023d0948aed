"""What a controller mounts is found."""

import os
from pathlib import Path

import pytest

from runtime.workspace.mounts import Mounts
from tests.workspace.documents import load


@pytest.mark.parametrize(
    "place", ["tmp/.docker/config/config.json", "root/.docker/config.json", "root/.docker/config.d/in/a.json"]
)
def test_mounted_push_secret_is_found(place: str, pod: Path) -> None:
    file = pod / place
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    found = load(None, pod, overrides={"--output": ["registry.example.com/a/b:1"]}).config.output.credentials
    assert found in (file, pod / "root/.docker/config.d")


def test_secrets_of_another_user_are_skipped(tmp_path: Path) -> None:
    """A container that runs as 12345 may not even look below /root."""
    (tmp_path / "root").mkdir(mode=0)
    user = os.geteuid()
    try:
        os.seteuid(12345 if user == 0 else user)
        assert Mounts(tmp_path, {}).credentials() is None
    finally:
        os.seteuid(user)
