"""Compressed files are read by their first bytes, and a damaged or cut one is an error of the file."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from runtime.errors import CapacityError, DataError
from runtime.tuning.data.formats import read
from runtime.tuning.data.limits import ByteCount, ByteLimit

LINES = b'{"text":"a"}\n' * 3
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_every_format_is_read_out_of_every_compression(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSORS[suffix]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(LINES))
    (tmp_path / f"b.json.{suffix}").write_bytes(compress(b'[{"text":"a"}]'))
    (tmp_path / f"c.csv.{suffix}").write_bytes(compress(b"text\na\n"))
    (tmp_path / "d.jsonl").write_bytes(compress(LINES))  # the suffix was lost on the way
    (tmp_path / f"e.jsonl.{suffix}").write_bytes(LINES)  # a client has unpacked it, and kept the name
    (tmp_path / f"f.jsonl.{suffix}").write_bytes(compress(LINES) + compress(LINES))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "plain")
    (tmp_path / f"g.parquet.{suffix}").write_bytes(compress((tmp_path / "plain").read_bytes()))
    found = {path.name[0]: [dict(row) for row in read(path)] for path in tmp_path.iterdir()}  # type: ignore[arg-type]
    assert {name: len(rows) for name, rows in found.items()} == dict(
        zip("abcdefgp", (3, 1, 1, 3, 3, 6, 1, 1), strict=True)
    )
    assert all(row == {"text": "a"} for rows in found.values() for row in rows)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_cut_or_damaged_file_is_an_error_and_never_fewer_rows(tmp_path: Path, suffix: str) -> None:
    rows = b"".join(b'{"text":"%d"}\n' % (number * 7919) for number in range(5000))
    data = COMPRESSORS[suffix](rows)
    path = tmp_path / f"a.jsonl.{suffix}"
    damaged = data[:100] + b"damage" * 10 + data[160:]
    for content in (data[: len(data) // 2], *([damaged] if suffix != "zst" else [])):  # zstd has no check sum
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: not a readable jsonl file \("):
            list(read(path))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_what_unpacks_to_more_than_the_limit_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESSORS[suffix](LINES * 20_000))
    with pytest.raises(CapacityError, match="unpacks to more than 100000 bytes"):
        list(read(path, None, ByteCount(ByteLimit(100_000, "a test"))))


def test_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(DataError, match="is packed as zip, which is not read: unpack it"):
        list(read(path))
