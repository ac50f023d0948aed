"""The digest of weights: as a user computes it in a shell, from names in the hub's cache, or not at all."""

import hashlib
import logging
import os
import subprocess
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.weights_digest import PendingDigest, mode, of_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model-00002-of-00002", "model-00001-of-00002", "Extra"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 1000)
    (folder / "config.json").write_text("{}")
    return folder


def shell(folder: Path, command: str) -> str:
    return subprocess.check_output(command, shell=True, cwd=folder, text=True).split()[0]


def test_digest_is_that_of_one_shell_line(model: Path) -> None:
    several = "LC_ALL=C; export LC_ALL; sha256sum *.safetensors | sha256sum"
    assert of_folder(model) == shell(model, several)
    for path in sorted(model.glob("*.safetensors"))[1:]:
        path.unlink()
    assert of_folder(model) == shell(model, "sha256sum *.safetensors")
    assert of_folder(model / "nothing") is None


def in_cache(root: Path, blob: str, data: bytes) -> Path:
    """Lay a file as huggingface_hub does: a link in the snapshot to a blob named by its ETag."""
    snapshot = root / "models--a--b/snapshots/0123"
    (root / "models--a--b/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (root / "models--a--b/blobs" / blob).write_bytes(data)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_name_of_a_large_file_in_the_hubs_cache_is_its_digest(tmp_path: Path) -> None:
    named = "5" * 64  # another than its own, so that the test sees which is taken
    snapshot = in_cache(tmp_path, named, b"weights")
    assert of_folder(snapshot, trusted_names=True) == named
    assert of_folder(snapshot) == hashlib.sha256(b"weights").hexdigest()


def test_small_files_and_links_elsewhere_are_read(tmp_path: Path) -> None:
    data = hashlib.sha256(b"weights").hexdigest()
    assert of_folder(in_cache(tmp_path, "6" * 40, b"weights"), trusted_names=True) == data  # a git digest
    linked = tmp_path / "model"
    linked.mkdir()
    (tmp_path / ("7" * 64)).write_bytes(b"weights")
    (linked / "model.safetensors").symlink_to(tmp_path / ("7" * 64))
    assert of_folder(linked, trusted_names=True) == data


def test_pending_digest_is_computed_once_at_the_lowest_priority(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = os.setpriority
    monkeypatch.setattr(os, "setpriority", lambda *given: (seen.append(given[1:]), real(*given)))
    pending = PendingDigest(model, name="mine")
    assert pending.value is None
    with caplog.at_level(logging.INFO):
        pending.start()
        assert pending.wait() == pending.wait() == of_folder(model)
    assert caplog.text.count(f"weights of mine: sha256 {pending.value}") == 1
    ((thread, priority),) = seen
    assert priority == 19
    assert thread != os.getpid()  # the process keeps its own
    assert os.getpriority(os.PRIO_PROCESS, 0) == os.getpriority(os.PRIO_PROCESS, os.getpid()) < 19


def test_digest_that_is_off_or_cannot_be_read_is_none(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PendingDigest(model, name="mine", mode="off").wait() is None

    def refuse(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("runtime.weights_digest.sha256", refuse)
    assert PendingDigest(model, name="mine").wait() is None
    assert "weights of mine: no digest, they cannot be read (Input/output error)" in caplog.text


def test_environment_names_a_mode() -> None:
    assert (mode(None), mode(""), mode("full")) == ("auto", "auto", "full")
    with pytest.raises(ConfigError, match="RUNTIME_WEIGHTS_DIGEST is 'yes', expected one of auto, full, off"):
        mode("yes")
