"""Files that are whole or absent."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from runtime import files


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "state.json"
    files.write_atomic(path, "old")

    def broken(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert files.sha256(path) == hashlib.sha256(b"abc").hexdigest()


def test_a_lock_is_free_when_the_last_process_that_shares_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path, wait_s=0) as lock:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])
        with pytest.raises(BlockingIOError), files.locked(path, wait_s=0):
            pass
    with pytest.raises(BlockingIOError), files.locked(path, wait_s=0.15):
        pass
    child.communicate()
    with files.locked(path, wait_s=0):
        pass
