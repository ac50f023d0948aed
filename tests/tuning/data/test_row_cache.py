"""Encoded rows are kept for their owner alone, up to a size, and the oldest go first."""

import os
import stat
from pathlib import Path

import pytest

from runtime import files
from runtime.tuning.data import row_cache
from runtime.tuning.data.row_cache import RowCache


def made(folder: Path, size: int) -> Path:
    folder.mkdir()
    (folder / "rows.arrow").write_bytes(b"x" * size)
    (folder / "facts.json").write_text("{}")
    return folder


def keep(cache: RowCache, key: str, folder: Path, size: int, used: float) -> None:
    cache.keep(key, made(folder / f"made-{key}", size))
    if (cache.folder / key).exists():
        os.utime(cache.folder / key, (used, used))


def test_the_entries_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "MOST_BYTES", 1000)
    cache = RowCache(tmp_path / "cache")
    for number, key in enumerate(("b", "a", "c")):
        keep(cache, key, tmp_path, 400, used=1000.0 + number)
    assert {path.name for path in cache.folder.iterdir()} == {"a", "c"}
    keep(cache, "large", tmp_path, 1200, used=2000)
    assert {path.name for path in cache.folder.iterdir()} == {"a", "c"}


def test_only_the_owner_can_use_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = RowCache(tmp_path / "cache")
    keep(cache, "a", tmp_path, 10, used=1)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((cache.folder / "a").stat().st_mode) == 0o700
    cache.folder.chmod(0o770)
    assert cache.read("a") is None
    keep(cache, "b", tmp_path, 10, used=1)
    assert not (cache.folder / "b").exists()
    assert "others may write to it; chmod 700, or name another data.cache" in caplog.text


def test_a_folder_that_cannot_be_made_is_said_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "file").touch()
    keep(RowCache(tmp_path / "file" / "cache"), "a", tmp_path, 10, used=1)
    assert "the encoded rows are not kept for later jobs: " in caplog.text


def test_what_a_killed_job_left_unfinished_is_removed(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "cache")
    keep(cache, "a", tmp_path, 10, used=1)
    for name in ("b", "c"):
        (cache.folder / f".{name}.01234567.part").mkdir()
    with files.locked(cache.folder / ".c.01234567.part"):  # as the job does that writes it
        keep(cache, "d", tmp_path, 10, used=1)
    assert {path.name for path in cache.folder.iterdir()} == {"a", "d", ".c.01234567.part"}
    work = tmp_path / "work"
    work.mkdir()
    made(work / ".encoded-0.01234567.part", 10)
    with row_cache.new_folder(work / "encoded-0") as scratch:
        (scratch / "rows.arrow").touch()
    assert {path.name for path in work.iterdir()} == {"encoded-0"}
