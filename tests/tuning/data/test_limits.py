"""Limits on the bytes of data: where they come from, and what a counter says when one is exceeded."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import hardware
from runtime.errors import CapacityError, DataError
from runtime.tuning.data.limits import LARGEST_ROW_BYTES, ROW_BYTES, ByteCount, DataLimits, check_row

SET = DataLimits.of(1000, Path("/nowhere"))


def test_a_limit_that_is_set_holds_for_both_and_is_named() -> None:
    for limit in (SET.wire, SET.unpacked):
        with pytest.raises(DataError, match=r"a.csv: .* 1000 bytes .* --max-data-bytes"):
            ByteCount(limit).add(1001, "a.csv")


def test_limits_follow_from_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = hardware.host().memory_bytes
    one, four = (DataLimits.of(None, tmp_path / "new" / "er", processes=count) for count in (1, 4))
    assert one.unpacked.most == 4 * four.unpacked.most == pytest.approx(memory / 4, rel=0.01)
    with pytest.raises(CapacityError, match=r"25% of this machine's memory, for each of 4 processes"):
        ByteCount(four.unpacked).add(memory, "a.csv")
    for free, reason in (
        (memory, f"90% of the free space in {tmp_path};"),
        (2 * memory, "the memory of this"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        limit = DataLimits.of(None, tmp_path / "new").wire
        with pytest.raises(CapacityError, match=reason):
            ByteCount(limit, "sends").add(memory + 1, "a.csv")


def test_files_count_together() -> None:
    count = ByteCount(SET.unpacked)
    count.add(600, "a.csv")
    assert count.left == 400
    with pytest.raises(DataError, match=r"b\.csv"):
        count.add(600, "b.csv")


def test_rows_count_beside_their_values() -> None:
    count = ByteCount(SET.unpacked)
    count.add_rows(1, 100, "a.csv")
    assert count.left == 1000 - 100 - ROW_BYTES
    with pytest.raises(DataError):
        count.add_rows(1, 0, "a.csv")


def test_what_is_expected_is_checked_and_not_counted() -> None:
    count = ByteCount(SET.unpacked)
    count.expect(1000, "a.csv")
    count.expect(1000, "a.csv")
    with pytest.raises(DataError, match=r"a\.csv"):
        count.expect(1001, "a.csv")


def test_threads_count_every_byte() -> None:
    count = ByteCount(DataLimits.of(1 << 30, Path()).wire)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [count.add(1, "a") for _ in range(2000)], range(8)))
    assert count.left == (1 << 30) - 16000


def test_one_row_has_a_limit_of_its_own() -> None:
    check_row(LARGEST_ROW_BYTES, "a.csv: row 2")
    with pytest.raises(DataError, match=r"a.csv: row 2: has more than .* in one row"):
        check_row(LARGEST_ROW_BYTES + 1, "a.csv: row 2")
