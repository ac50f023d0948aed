"""Files that are whole or absent."""

import errno
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import lock_descriptor

from runtime import files
from runtime.errors import CapacityError, ConfigError, Failure, TransientError


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


def test_a_lock_of_a_folder_is_free_after_the_block(tmp_path: Path) -> None:
    with files.locked(tmp_path), pytest.raises(BlockingIOError), files.locked(tmp_path, wait_s=0):
        pass
    with files.locked(tmp_path, wait_s=0):
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.atomic_file(tmp_path / "x") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "files"])
def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path, kind: str) -> None:
    dead, alive = tmp_path / ".x.01234567.part", tmp_path / ".x.89abcdef.part"
    for path in (dead, alive):
        path.mkdir()
        (path / "half").touch()
    (tmp_path / ".x.part").touch()  # somebody's: not named as files here are
    with files.locked(alive):
        if kind == "file":
            files.write_atomic(tmp_path / "x", "whole")
        elif kind == "folder":
            with files.atomic_folder(tmp_path / "x") as new:
                (new / "whole").touch()
        else:
            with files.atomic_files(tmp_path, last="x") as new:
                (new / "x").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.part", alive.name}


def test_a_writer_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "x") as first, files.atomic_file(tmp_path / "y") as second:
        (first / "a").touch()
        second.write(b"whole")
        with files.atomic_folder(tmp_path / "x") as other:
            (other / "b").touch()
        files.write_atomic(tmp_path / "y", "early")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
    assert (tmp_path / "y").read_bytes() == b"whole"


def test_a_folder_of_its_owner_alone_is_one_from_the_start(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "x", synced=False, mode=0o700) as new:
        (new / "secret").touch(mode=0o600)
        assert new.stat().st_mode & 0o077 == 0
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "x/secret").stat().st_mode & 0o777 == 0o600


def test_names_as_long_as_a_file_system_takes_are_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        files.write_atomic(tmp_path / name, "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_who_waits_for_a_lock_whose_file_is_removed_holds_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def holds_what_is_there() -> bool:
        with files.locked(path) as descriptor:
            return os.path.samestat(os.fstat(descriptor), path.stat())

    with ThreadPoolExecutor(1) as pool:
        with files.locked(path):
            waiter = pool.submit(holds_what_is_there)
            path.unlink()
        assert waiter.result(60)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_lock_of_a_link_is_that_of_what_it_names(tmp_path: Path, kind: str) -> None:
    (tmp_path / "real").mkdir() if kind == "folder" else (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    with (
        files.locked(tmp_path / "link", wait_s=0),
        pytest.raises(BlockingIOError),
        files.locked(tmp_path / "real", wait_s=0),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, CapacityError),
        (errno.EFBIG, CapacityError),
        (errno.EROFS, ConfigError),
        (errno.EMFILE, ConfigError),
        (errno.EIO, TransientError),
        (errno.ESTALE, TransientError),
    ],
)
def test_what_a_disk_refuses_is_told_from_what_may_pass(number: int, kind: type[Failure]) -> None:
    failure = files.disk_failure(OSError(number, os.strerror(number), "/a/b"))
    assert type(failure) is kind
    assert failure is not None
    assert number == errno.EMFILE or str(failure).startswith("/a/b: ")


def test_what_a_library_in_rust_says_of_the_disk_is_understood(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(ConfigError, match="cannot be used"), files.disk_errors(tmp_path):
        save_file({}, str(tmp_path / "missing" / "x.safetensors"))
    with pytest.raises(ValueError, match="of another kind"), files.disk_errors(tmp_path):
        raise ValueError("of another kind")


def test_permissions_are_those_requested_or_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for mode in (None, 0o600, 0o644):
            files.write_atomic(tmp_path / str(mode), "x", mode=mode)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert found == {"None": 0o640, str(0o600): 0o600, str(0o644): 0o644}


def test_writers_of_one_file_at_once_do_not_mix(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: files.write_atomic(tmp_path / "x", text), texts * 4))
    assert (tmp_path / "x").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_looks_abandoned_is_removed_under_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a file that another process has just made, and is about to lock, is taken from it."""
    left = tmp_path / ".x.0123abcd.part"
    left.touch()
    locked = []

    def remove(path: Path) -> None:
        with path.open() as file:
            locked.append(not lock_descriptor(file.fileno(), blocking=False))
        path.unlink()

    monkeypatch.setattr(files, "remove", remove)
    files.remove_abandoned(tmp_path, "x")
    assert (locked, left.exists()) == ([True], False)


def test_a_folder_appears_whole_and_replaces_another(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    for number in range(2):
        with files.atomic_folder(place) as new:
            (new / str(number)).touch(mode=0o600)
            (new / "sub").mkdir()
            assert place.exists() == bool(number)
        assert sorted(path.name for path in place.iterdir()) == [str(number), "sub"]
        assert (place / str(number)).stat().st_mode & 0o044, "others may read it too"
    with pytest.raises(RuntimeError), files.atomic_folder(place) as new:
        raise RuntimeError
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert (place / "1").exists()


def test_files_move_into_a_folder_the_named_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").touch()
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (moved.append(path.name), replace(path, to))[1])
    with files.atomic_files(tmp_path, last="b") as scratch:
        for name in ("a", "b", "c"):
            (scratch / name).write_text(name)
        assert {path.name for path in tmp_path.iterdir()} == {"other", scratch.name}
    assert moved == ["a", "c", "b"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "other"}


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"RUNTIME_CACHE": "/r", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/r"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/workspace-runtime"),
        ({"HOME": "/h"}, "/h/.cache/workspace-runtime"),
        ({}, "/tmp/.cache/workspace-runtime"),
    ],
)
def test_the_cache_is_where_the_environment_says(environ: dict[str, str], folder: str) -> None:
    assert files.cache_folder(environ) == Path(folder)


def test_what_lies_at_a_path_is_told_from_what_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    assert files.kind_of(str(tmp_path)) == "folder"
    assert files.kind_of(str(tmp_path / "rows.csv")) == "file"
    for word in ("no/such", "x" * 300, "~nobody-of-that-name/x", "a\0b", "oci:x"):
        assert files.kind_of(word) is None
