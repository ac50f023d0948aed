"""Small files that stand for gigabytes end in one line, in bounded memory and time."""

import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from backports import zstd

LIMIT = 32 << 20
MOST_GROWN = 400 << 20
"""Of the reading process: a document that is parsed whole, a page, a batch, Python's objects."""
MOST_SECONDS = 30
TOO_MUCH = r"unpacks to more than 33554432 bytes \(32.0 MiB, all data together\), the limit that --max-data"
MEMORY = r"reading it takes more memory than the \d.* that it may take here"
ONE_ROW = r"more than 16777216 bytes \(16.0 MiB\) in one row"


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


def arrow(batch: pa.RecordBatch, compression: str | None = "zstd") -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_batch(batch)
    return sink.getvalue()


def repeated(text: str, rows: int) -> pa.Array:
    """`rows` times `text`, which is stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [text])


def in_one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def pair(answer: pa.Array) -> pa.Table:
    return pa.table({"instruction": ["q"] * len(answer), "output": answer})


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(columns)


def claiming(size: int) -> bytes:
    """An Arrow file whose compressed buffer says that it unpacks to `size` bytes."""
    text = "a" * 200_000
    data = bytearray(arrow(batch(instruction=["q"], output=[text])))
    at = data.rindex(len(text).to_bytes(8, "little"))
    data[at : at + 8] = size.to_bytes(8, "little")
    return bytes(data)


def footer(size: int) -> bytes:
    return parquet(pair(pa.array(["a"])))[:-8] + size.to_bytes(4, "little") + b"PAR1"


def zstd_of(*parts: tuple[bytes, int]) -> bytes:
    sink = io.BytesIO()
    with zstd.open(sink, "wb") as file:
        for part, count in parts:
            file.write(part * count)
    return sink.getvalue()


MIB = 1 << 20
RUNS = pa.RunEndEncodedArray.from_arrays(pa.array([10**9], pa.int32()), pa.array(["w" * 1000]))
BOMBS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "cell.parquet": (lambda: parquet(pair(pa.array(["a" * 20 * MIB]))), "DataError", ONE_ROW),
    "dictionary.parquet": (lambda: parquet(pair(repeated("w" * 2000, 50_000))), "DataLimitError", TOO_MUCH),
    "nulls.parquet": (
        lambda: parquet(pa.table({"text": pa.nulls(2_000_000, pa.string())})),
        "DataLimitError",
        TOO_MUCH,
    ),
    "list.parquet": (
        lambda: parquet(
            pa.table({"text": ["a"], "x": in_one_list(pa.nulls(55 * MIB, pa.int8()))}),
            use_dictionary=False,
        ),
        "DataError",
        r"its rows take 275.0 MiB each on average, expected at most 256.0 MiB",
    ),
    "texts.parquet": (
        lambda: parquet(pa.table({"text": in_one_list(repeated("w" * 2000, 50_000).cast(pa.string()))})),
        "DataLimitError",
        TOO_MUCH,
    ),
    "footer.parquet": (lambda: footer(0x7FFFFFFF), "DataError", "not a readable parquet file"),
    "compressed.arrow": (
        lambda: arrow(batch(instruction=["q" * 2000] * 40_000, output=["a"] * 40_000)),
        "DataLimitError",
        TOO_MUCH,
    ),
    "claims.arrow": (
        lambda: claiming(1 << 40),
        "CapacityError",
        r"takes more memory than the .* that it may",
    ),
    "claims_less.arrow": (
        lambda: claiming(1 << 33),
        "CapacityError",
        r"takes more memory than the .* that it",
    ),
    "lies.arrow": (lambda: claiming(1000), "DataError", "not a readable arrow file"),
    "rows.arrow": (lambda: arrow(batch(text=pa.nulls(10**9)), None), "DataLimitError", TOO_MUCH),
    "runs.arrow": (
        lambda: arrow(batch(text=RUNS), None),
        "DataLimitError",
        TOO_MUCH,
    ),
    "nothing.arrow": (
        lambda: arrow(batch(messages=in_one_list(pa.nulls(10**9))), None),
        "DataLimitError",
        TOO_MUCH,
    ),
    "dictionary.arrow": (
        lambda: arrow(batch(text=in_one_list(repeated("w" * MIB, 10_000)))),
        "DataLimitError",
        TOO_MUCH,
    ),
    "lines.jsonl.gz": (lambda: gzip.compress(b"\n" * (64 * MIB)), "DataLimitError", TOO_MUCH),
    "spaces.json.zst": (lambda: zstd_of((b" " * MIB, 64)), "DataLimitError", TOO_MUCH),
    "string.jsonl.zst": (
        lambda: zstd_of((b'{"text": "', 1), (b"a" * MIB, 64)),
        "DataLimitError",
        TOO_MUCH,
    ),
    "string.json.zst": (lambda: zstd_of((b'[{"text": "', 1), (b"a" * MIB, 64)), "DataError", ONE_ROW),
    "objects.json.zst": (
        lambda: zstd_of((b'{"data": [', 1), (b"{}," * MIB, 8), (b"{}]}", 1)),
        "DataLimitError",
        TOO_MUCH,
    ),
    "deep.json": (lambda: b"[" * MIB + b"]" * MIB, "DataError", "nested too deeply"),
    "deep.jsonl": (lambda: b'{"a":' * MIB + b"1" + b"}" * MIB, "DataError", "nested too deeply"),
    "digits.jsonl": (lambda: b'{"text": ' + b"1" * MIB + b"}", "DataError", "a number has too many digits"),
    "field.csv.zst": (
        lambda: zstd_of((b'instruction,output\n"', 1), (b"a" * MIB, 64)),
        "DataLimitError",
        TOO_MUCH,
    ),
    "field_of_a_row.csv.zst": (
        lambda: zstd_of((b'instruction,output\n"', 1), (b"a" * MIB, 20)),
        "DataError",
        r"field larger than field limit \(16777216\)",
    ),
    "header.csv.zst": (lambda: zstd_of((b"a" * MIB, 64)), "DataLimitError", TOO_MUCH),
    "blank.csv.zst": (
        lambda: zstd_of((b"instruction,output\n", 1), (b"\n" * MIB, 20)),
        "DataError",
        "more than 100000 blank lines",
    ),
}


def read(files: list[Path], *, policy: str = "fail") -> dict[str, dict[str, Any]]:
    """Read each of `files` with a limit of LIMIT; return by name what became of it."""
    command = [sys.executable, "-m", "tests.attacks.reader_process", str(LIMIT), policy, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["file"]: line for line in lines}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def outcomes(files: list[Path]) -> dict[str, dict[str, Any]]:
    return read(files)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_one_line_within_memory_and_time(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    _, kind, message = BOMBS[name]
    found = outcomes[name]
    assert found["outcome"] == kind, found
    assert re.search(message, found["text"]), found
    assert name in found["text"]
    assert "\n" not in found["text"]
    assert found["grown"] < MOST_GROWN
    assert found["seconds"] < MOST_SECONDS


def test_no_limit_is_skipped_as_a_bad_row(files: list[Path]) -> None:
    limited = [path for path in files if BOMBS[path.name][1] == "DataLimitError"]
    for name, found in read(limited, policy="skip").items():
        assert found["outcome"] == "DataLimitError", (name, found)


def test_damaged_files_never_end_the_process(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {n}" for n in range(50)], "x": [[{"a": n}] * 3 for n in range(50)]})
    whole = {"arrow": arrow(table.to_batches()[0], None), "parquet": parquet(table)}
    chance = random.Random(1)
    for suffix, data in whole.items():
        for number in range(15):
            damaged = bytearray(data)
            for _ in range(chance.choice((1, 4, 20))):
                at = chance.randrange(8, len(damaged) - 8)
                damaged[at : at + 4] = chance.choice((b"\xff\xff\xff\x7f", b"\0\0\0\x10", b"\x01\0\0\0"))
            (tmp_path / f"{number}.{suffix}").write_bytes(damaged[: len(data)])
    for name, found in read(sorted(tmp_path.iterdir())).items():
        assert found["outcome"] in {"read", "DataError", "DataLimitError", "CapacityError"}, (name, found)
