"""Rows of every common shape become examples, and a bad one is named."""

import json
from pathlib import Path
from typing import Any

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
