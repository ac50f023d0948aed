"""Rows of every common shape become examples, and a bad one is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import DataError
from runtime.tuning.data import dataset
from runtime.tuning.data.dataset import held_out_rows, split
from runtime.tuning.settings import DataSource

MESSAGES = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]


def source(folder: Path, **settings: Any) -> DataSource:
    return DataSource(folder=folder, **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": "x"}, "no known columns (has foo)"),
        ({"messages": None}, "column 'messages' is empty"),
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message"),
        ({"messages": [{"role": "wizard", "content": "q"}]}, "role 'wizard'"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"prompt": "q", "completion": " "}, "column 'completion' is empty"),
        ({"prompt": None, "completion": "a"}, "column 'prompt' is empty"),
    ],
)
def test_fault_21_bad_row_names_file_row_and_column(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    good = {"prompt": "q", "completion": "a"} if "prompt" in row else {"messages": MESSAGES}
    lines = [json.dumps(good if "foo" not in row else {"text": "t"}), json.dumps(row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        dataset.load(source(tmp_path))
    assert "rows.jsonl: row 2" in str(caught.value)
    assert message in str(caught.value)
    kept = dataset.load(source(tmp_path, on_bad_row="skip"))
    assert (len(kept.examples), kept.bad_rows.skipped) == (1, 1)


@pytest.mark.parametrize("other", ['{"accuracy": 0.9}', "{", '[["a", "b"]]'])
def test_a_file_that_is_perhaps_no_data_is_named_with_what_to_do(tmp_path: Path, other: str) -> None:
    lines(tmp_path, "train.jsonl", 3)
    (tmp_path / "scored.json").write_text(other)
    advice = "if scored.json is no data, give the file that is with --data"
    with pytest.raises(DataError, match=rf"scored\.json.*; {advice}"):
        dataset.load(source(tmp_path))
    with pytest.raises(DataError) as caught:
        dataset.load(source(tmp_path, file=tmp_path / "scored.json"))
    assert advice not in str(caught.value)


def test_bad_rows_behind_good_ones_do_not_put_their_file_in_doubt(tmp_path: Path) -> None:
    lines(tmp_path, "train.jsonl", 3)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"foo": 1}\n')
    with pytest.raises(DataError) as caught:
        dataset.load(source(tmp_path))
    assert "b.jsonl: row 2" in str(caught.value)
    assert "is no data" not in str(caught.value)


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


def lines(folder: Path, name: str, count: int, text: str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{text or name} {n}"}) + "\n" for n in range(count)))


def test_rows_of_a_validation_set_are_held_out_and_those_of_a_test_set_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, rows in (("train.jsonl", 60), ("dev.jsonl", 7), ("test.jsonl", 3)):
        lines(tmp_path, name, rows)
    data = dataset.load(source(tmp_path))
    train, held_out = dataset.divide(data, source(tmp_path))
    assert (len(train), len(held_out)) == (60, 7)
    assert {example.text.split()[0] for example in held_out} == {"dev.jsonl"}
    assert [(file.name, file.split) for file in data.files] == [
        ("dev.jsonl", "validation"),
        ("train.jsonl", "train"),
    ]
    assert [digest.partition(":")[0] == "validation" for digest in data.summary().digests] == [True, False]
    assert dataset.digests_of(source(tmp_path)) == data.summary().digests
    assert caplog.messages == [
        "7 rows held out, of 1 jsonl file (dev.jsonl)",
        "60 rows read, of 1 jsonl file (train.jsonl)",
        "1 file left out, with rows to test on: test.jsonl",
    ]
    dataset.divide(data, source(tmp_path, train_share=0.9))
    assert caplog.messages[-1] == "train_test_split does not count: the data has a validation set of its own"


def test_files_that_are_given_one_by_one_have_splits_too(tmp_path: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl"):
        lines(tmp_path, name, 2)
    data = dataset.load(source(tmp_path), [tmp_path / "validation.jsonl", tmp_path / "train.jsonl"])
    assert (len(data.examples), len(data.validation)) == (2, 2)
    alone = dataset.load(source(tmp_path, file=tmp_path / "validation.jsonl"))
    assert (len(alone.examples), len(alone.validation)) == (2, 0)


def test_many_files_are_one_line_and_parts_without_rows_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for part in range(200):
        lines(tmp_path, f"part-{part:05}.json", part % 2, f"part {part}")
    assert len(dataset.load(source(tmp_path)).examples) == 100
    assert caplog.messages == ["100 rows read, of 200 json files (part-00000.json … part-00199.json)"]


def test_data_without_rows_is_an_error(tmp_path: Path) -> None:
    lines(tmp_path, "train.jsonl", 0)
    with pytest.raises(DataError, match=r"train\.jsonl: has no rows, expected at least one"):
        dataset.load(source(tmp_path))
    lines(tmp_path, "validation.jsonl", 3)
    with pytest.raises(DataError, match="has no rows"):
        dataset.load(source(tmp_path))


def test_what_may_be_the_same_rows_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines(tmp_path, "a.jsonl", 3, "same")
    lines(tmp_path, "b/c.jsonl", 3, "same")
    lines(tmp_path, "d.jsonl", 3)
    (tmp_path / "d.csv").write_text("text\nd\n")
    lines(tmp_path, "validation.jsonl", 3, "same")
    dataset.load(source(tmp_path))
    assert caplog.messages == [
        "a.jsonl and b/c.jsonl and validation.jsonl perhaps hold the same rows, which then are both trained "
        "on and held out",
        "d.csv and d.jsonl perhaps hold the same rows, which then count twice",
    ]


def test_rows_that_cannot_be_read_are_skipped_like_those_that_are_no_examples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines(tmp_path / "folder", "good.jsonl", 5)
    broken = '{"text": "a"}\n{"text": "b\n\n{"tex": "c"}\n'
    (tmp_path / "folder" / "rows.jsonl").write_text(broken)
    with pytest.raises(DataError, match=r"^folder/rows\.jsonl: row 2 is not valid JSON"):
        dataset.load(source(tmp_path))
    data = dataset.load(source(tmp_path, on_bad_row="skip"))
    assert (len(data.examples), data.bad_rows.skipped, data.bad_rows.rows) == (6, 2, 8)
    assert "folder/rows.jsonl: row 3" in data.bad_rows
    assert "reading: 2 of 8 rows cannot be used (1 × is not valid JSON" in caplog.text
    (tmp_path / "folder" / "good.jsonl").unlink()
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used .* more than half"):
        dataset.load(source(tmp_path, on_bad_row="skip"))


def test_a_cell_that_cannot_be_converted_is_a_bad_row_that_names_its_column(tmp_path: Path) -> None:
    days = pa.array([2**30], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"prompt": ["q"], "completion": days, "unused": days}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"^a\.parquet: row 1.* column 'completion' \(date32\[day\]\) cannot be"
    ):
        dataset.load(source(tmp_path))
