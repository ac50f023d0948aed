"""Columnar files give rows lazily: what is not asked for is not converted, and cannot fail."""

import contextlib
import random
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from runtime.errors import CapacityError, DataError
from runtime.tuning.data.formats import read
from runtime.tuning.data.limits import ByteCount, ByteLimit


def written(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


FAR = {
    "date": pa.array([2**30], pa.int32()).cast(pa.date32()),
    "timestamp": pa.array([-(2**62)], pa.timestamp("us")),
    "duration": pa.array([2**62], pa.duration("s")),
    "zone": pa.array([0], pa.timestamp("us", tz="Mars/Olympus")),
}


@pytest.mark.parametrize("kind", FAR)
def test_a_column_that_python_cannot_have_fails_only_when_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    table = pa.table({"prompt": ["q"], "x": FAR[kind]})
    (row,) = read(written(tmp_path / "a.parquet", table))
    assert not isinstance(row, DataError)
    assert (row["prompt"], list(row), len(row), "x" in row, row.get("y")) == (
        "q",
        ["prompt", "x"],
        2,
        True,
        None,
    )
    with pytest.raises(DataError, match=r"^column 'x' \(.*\) cannot be read: "):
        row["x"]


def test_of_a_column_with_one_bad_value_the_other_rows_are_read(tmp_path: Path) -> None:
    days = pa.array([0, 2**30, 1], pa.int32()).cast(pa.date32())
    first, second, third = read(written(tmp_path / "a.parquet", pa.table({"x": days})))
    assert [str(row["x"]) for row in (first, third)] == ["1970-01-01", "1970-01-02"]  # type: ignore[index]
    with pytest.raises(DataError, match="column 'x'"):
        second["x"]  # type: ignore[index]


def test_maps_are_mappings_and_a_column_that_is_there_twice_is_refused_when_used(tmp_path: Path) -> None:
    turn = pa.map_(pa.string(), pa.string())
    table = pa.table([pa.array([[[("role", "user")]]], pa.list_(turn)), ["a"], ["b"]], names=["m", "p", "p"])
    (row,) = read(written(tmp_path / "a.parquet", table))
    assert row["m"] == [{"role": "user"}]  # type: ignore[index]
    with pytest.raises(DataError, match="column 'p' is there twice"):
        row["p"]  # type: ignore[index]


def test_arrow_files_streams_and_feather_are_read_whatever_their_suffix(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(2500)]})
    for compression in ("zstd", "lz4", "uncompressed"):
        pa.feather.write_feather(table, tmp_path / "a.feather", compression=compression)
        assert [row["text"] for row in read(tmp_path / "a.feather")] == table["text"].to_pylist()  # type: ignore[index]
    with (
        pa.OSFile(str(tmp_path / "b.feather"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=700)
    assert [row["text"] for row in read(tmp_path / "b.feather")] == table["text"].to_pylist()  # type: ignore[index]
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(DataError, match=r"old\.feather: a Feather file of version 1"):
        list(read(tmp_path / "old.feather"))


def test_what_is_converted_is_counted_and_what_is_not_is_not(tmp_path: Path) -> None:
    table = pa.table({"text": ["a" * 1000] * 50, "image": [b"x" * 100_000] * 50})
    path = written(tmp_path / "a.parquet", table)

    def asked(column: str, most: int) -> list[Any]:
        return [row[column] for row in read(path, None, ByteCount(ByteLimit(most, "a test", given=True)))]  # type: ignore[index]

    assert len(asked("text", 100_000)) == 50
    with pytest.raises(DataError, match="unpacks to more than 100000 bytes"):
        asked("image", 100_000)


def test_parquet_of_large_rows_is_decoded_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.tuning.data.formats.columnar.BATCH_BYTES", 10_000)
    texts = [f"{number:06}" * 500 for number in range(20)]
    path = written(tmp_path / "a.parquet", pa.table({"text": texts}))
    assert [row["text"] for row in read(path)] == texts  # type: ignore[index]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_offsets_that_lead_out_of_a_damaged_file_are_not_followed(tmp_path: Path, new: Any) -> None:
    table = pa.table({"text": ["a" * 12345], "other": ["b"]})
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    offsets = struct.pack("<ii", 0, 12345)
    before, found, after = path.read_bytes().rpartition(offsets)  # an earlier one is a length in the header
    assert found
    path.write_bytes(before + struct.pack("<ii", 0, 2**30) + after)
    (row,) = read(path)
    assert row["other"] == "b"  # type: ignore[index]
    with pytest.raises(DataError, match="column 'text' is damaged: "):
        row["text"]  # type: ignore[index]


def test_random_damage_ends_as_rows_or_as_one_error(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number}" * 5 for number in range(100)], "n": [[1, 2]] * 100})
    pq.write_table(table, tmp_path / "a.parquet")
    pa.feather.write_feather(table, tmp_path / "a.feather")
    draw = random.Random(0)
    for path in (tmp_path / "a.parquet", tmp_path / "a.feather"):
        whole = path.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 3, 20))):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])
            with contextlib.suppress(DataError, CapacityError):
                for row in read(path):
                    assert not isinstance(row, DataError)
                    for name in row:
                        row[name]
