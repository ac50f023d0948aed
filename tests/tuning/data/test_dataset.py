"""Rows of every common shape become examples, and a bad one is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from runtime.errors import DataError
from runtime.tuning.data import dataset
from runtime.tuning.data.dataset import held_out_rows, split
from runtime.tuning.settings import DataSource

PAIR = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
MESSAGES = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]


def source(folder: Path, **settings: Any) -> DataSource:
    return DataSource(folder=folder, **settings)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"question": "q", "answer": "a"},
        {"Question": "q", "Answer": "a", "id": 7},
        {"input": "q", "output": "a"},
        {"messages": json.dumps(MESSAGES)},
    ],
    ids="-".join,
)
def test_known_columns_become_messages(row: dict[str, Any]) -> None:
    assert dataset.normalise(row, DataSource(), "row 1").messages == PAIR


def test_text_column_is_an_example_of_plain_text() -> None:
    example = dataset.normalise({"text": "once"}, DataSource(), "row 1")
    assert (example.messages, example.text) == ((), "once")


def test_input_and_context_go_under_the_question() -> None:
    for row in (
        {"instruction": "sum up", "input": "long", "output": "a"},
        {"question": "sum up", "context": "long", "answer": "a"},
    ):
        assert dataset.normalise(row, DataSource(), "").messages[0]["content"] == "sum up\n\nlong"


def test_column_settings_choose_columns() -> None:
    row = {"text": "t", "ask": "q", "reply": "a", "talk": MESSAGES}
    columns = DataSource(context_column="ask", response_column="reply")
    assert dataset.normalise(row, columns, "").messages == PAIR
    assert dataset.normalise(row, DataSource(messages_column="talk"), "").messages == PAIR
    assert (
        dataset.normalise(row, DataSource(response_column="reply", context_column="ask"), "").messages == PAIR
    )
    assert dataset.normalise({"body": "b"}, DataSource(response_column="body"), "").text == "b"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"foo": "x"}, "no known columns (has foo)"),
        ({"messages": None}, "column 'messages' is empty"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message"),
        ({"messages": [{"role": "wizard", "content": "q"}]}, "role 'wizard'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has content 3, expected text"),
        ({"prompt": "q", "completion": " "}, "column 'completion' is empty text"),
        ({"prompt": None, "completion": "a"}, "column 'prompt' is empty"),
    ],
)
def test_fault_21_bad_row_names_file_row_and_column(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    good = {"prompt": "q", "completion": "a"} if "prompt" in row else {"messages": MESSAGES}
    lines = [json.dumps(good if "foo" not in row else {"text": "t"}), json.dumps(row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        dataset.load(source(tmp_path))
    assert "rows.jsonl: row 2" in str(caught.value)
    assert said in str(caught.value)
    kept = dataset.load(source(tmp_path, on_bad_row="skip"))
    assert (len(kept.examples), kept.skipped) == (1, 1)


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


def frozen(example: dataset.Example) -> dataset.Example:
    turns = tuple(tuple(sorted(turn.items())) for turn in example.messages)
    return dataset.Example(turns)  # type: ignore[arg-type]


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
    ("name", "content", "said"),
    [
        ("a.parquet", b"<html>login</html>", "it starts with b'<html>"),
        ("a.parquet", b"", "not a readable parquet file"),
        ("a.json", b"hello", "not a JSON file"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "row 2 is not valid JSON"),
        ("a.csv", b"prompt,completion\nq\n", "row 1 does not have 2 columns"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_fault_20_file_that_is_not_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        dataset.load(source(tmp_path))
    assert said in str(caught.value)


def test_fault_21_corrupt_page_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": f"row {n}" * 50} for n in range(500)]), path)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable parquet file"):
        dataset.load(source(tmp_path))


def test_held_out_rule() -> None:
    assert [held_out_rows(rows, None) for rows in (10, 49, 50, 200, 1000, 10**6)] == [0, 0, 5, 10, 50, 100]
    assert held_out_rows(100, 0.8) == 20
    assert held_out_rows(100, 1) == 0


def test_split_keeps_every_row_once_and_follows_the_seed() -> None:
    rows = list(range(200))
    train, held_out = split(rows, DataSource())
    assert sorted(train + held_out) == rows
    assert len(held_out) == 10
    assert split(rows, DataSource()) == (train, held_out)
    assert split(rows, DataSource(shuffle_seed=1)) != (train, held_out)
    assert split(rows, DataSource(shuffle=False))[1] == rows[190:]
    with pytest.raises(DataError, match="leaves none of 3 rows"):
        split([1, 2, 3], DataSource(train_share=0.01))
