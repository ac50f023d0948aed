"""Files of every format read alike, and one that is not what its name says is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from runtime.config import parse
from runtime.errors import ConfigError, DataError
from runtime.tuning.data import dataset, formats
from runtime.tuning.data.example import Example
from runtime.tuning.settings import DataSource

PAIR = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


def source(folder: Path, **settings: Any) -> DataSource:
    return DataSource(folder=folder, **settings)


def test_every_format_reads_alike(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": "q", "completion": "a"}] * 3)
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet_download_true")
    pa.csv.write_csv(table, tmp_path / "c.csv")
    (tmp_path / "d.json").write_text(json.dumps(table.to_pylist()))
    (tmp_path / "e.json").write_text(json.dumps({"version": 1, "rows": table.to_pylist()}, indent=1))
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())) + "\n\n")
    with pa.OSFile(str(tmp_path / "g.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "h.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = dataset.load(source(tmp_path))
    assert [file.rows for file in data.files] == [3] * 8
    assert {example.messages for example in map(frozen, data.examples)} == {frozen_pair()}


def frozen(example: Example) -> Example:
    turns = tuple(tuple(sorted(turn.items())) for turn in example.messages)
    return Example(turns)  # type: ignore[arg-type]


def frozen_pair() -> Any:
    return tuple(tuple(sorted(turn.items())) for turn in PAIR)


def test_all_files_are_used_recursively_in_path_order(tmp_path: Path) -> None:
    for name in ("z.jsonl", "data/b.jsonl", "data/a.jsonl", ".hidden.jsonl", "c.jsonl.part"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("no data")
    texts = [example.text for example in dataset.load(source(tmp_path)).examples]
    assert texts == ["data/a.jsonl", "data/b.jsonl", "z.jsonl"]


def test_nothing_found_tells_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no data file \(found notes.txt\)"):
        dataset.load(source(tmp_path))
    with pytest.raises(DataError, match="no such directory"):
        dataset.load(source(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"<html>login</html>", "it starts with b'<html>"),
        ("a.parquet", b"", "not a readable parquet file"),
        ("a.json", b"hello", "not a JSON file"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "row 2 is not valid JSON"),
        ("a.csv", b"prompt,completion\nq\n", "row 1 does not have 2 columns"),
        ("a.json", b'[{"n": ' + b"1" * 5000 + b"}]", "row 1 is not valid JSON: a number has too many digits"),
        ("a.jsonl", b"\xff\xfd", "a.jsonl: row 1 is not UTF-8 text (byte 0xff"),
    ],
)
def test_fault_20_file_that_is_not_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        dataset.load(source(tmp_path))
    assert message in str(caught.value)


def test_fault_21_corrupt_page_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": f"row {n}" * 50} for n in range(500)]), path)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable parquet file"):
        dataset.load(source(tmp_path))


@pytest.mark.parametrize("size", [6, 100, -1])
def test_a_parquet_file_that_is_cut_short_says_so(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": f"row {n}"} for n in range(500)]), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        DataError, match=r"a.parquet: a Parquet file that is cut short: after [\d,]+ bytes .*again"
    ):
        dataset.load(source(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("rows.xlsx", b"PK\x03\x04", "a spreadsheet, which is not read: export its sheet as CSV"),
        ("rows.zip", b"PK\x03\x04", "an archive, which is not read: unpack it"),
        ("rows.sqlite", b"SQLite format 3", "a database, which is not read: export the table"),
    ],
)
def test_files_that_people_have_and_that_are_not_read_are_answered_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, advice: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for data in (source(tmp_path), source(tmp_path, file=tmp_path / name)):
        with pytest.raises(DataError, match=advice):
            dataset.load(data)


@pytest.mark.parametrize(("text", "kind"), [("JSONL", "jsonl"), (".ndjson", "jsonl"), ("tsv", "tsv")])
def test_a_format_is_named_as_people_write_it(text: str, kind: str) -> None:
    assert formats.named(text, "x") == kind


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("xlsx", "a spreadsheet, which"),
        ("json.gz", "compression is found by itself"),
        ("cvs", "expected one of"),
    ],
)
def test_a_format_that_is_none_is_answered_with_those_there_are(text: str, answer: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"--set extension is '{text}', expected one of parquet.*"
    ) as refused:
        formats.named(text, "--set extension")
    assert answer in str(refused.value)


def test_a_format_is_chosen_by_suffix_by_content_and_by_setting(tmp_path: Path) -> None:
    names = ("a.parquet", "a.PARQUET", "a.parquet_x", "a.ndjson", "a.jsonl_x", "a.csv", "a.arrow", "a.txt")
    kinds = [formats.file_format(Path(name)) for name in names]
    assert kinds == ["parquet", "parquet", "parquet", "jsonl", "jsonl", "csv", "arrow", None]
    pq.write_table(pa.Table.from_pylist([{"text": "t"}]), tmp_path / "blob")
    assert list(formats.read(tmp_path / "blob")) == [{"text": "t"}]
    (tmp_path / "rows.txt").write_text("text\nt\n")
    assert list(formats.read(tmp_path / "rows.txt", "csv")) == [{"text": "t"}]
    with pytest.raises(ConfigError, match="'extension' is 'xml', expected one of parquet, json, jsonl, csv"):
        parse(DataSource, {"extension": "xml"}, "job")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_what_stands_for_the_data_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(DataError, match=r"a pointer of Git LFS and not the data: run `git lfs pull`"):
        list(formats.read(path))
    path.write_text("<!DOCTYPE html><html><body>Log in")
    with pytest.raises(DataError, match="a web page and not data"):
        list(formats.read(path))


def test_a_file_of_no_known_format_is_told_how_to_name_one(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("prompt,completion")
    with pytest.raises(
        DataError, match=r"it starts with b'prompt.*--set extension=FORMAT.*: one of parquet, json"
    ):
        dataset.load(source(tmp_path, file=tmp_path / "rows.txt"))
