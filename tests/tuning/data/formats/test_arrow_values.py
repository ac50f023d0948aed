"""Cells of Arrow tables become Python values of which none can fail, and nulls inside them are absent."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import DataError
from runtime.tuning.data import dataset
from runtime.tuning.data.formats import arrow_values
from runtime.tuning.settings import DataSource

FAR = 2**62
TIMES = [
    (pa.timestamp("us"), 0, "1970-01-01 00:00:00.000000"),
    (pa.timestamp("ns"), 1, "1970-01-01 00:00:00.000000001"),
    (pa.timestamp("us", tz="America/New_York"), 0, "1970-01-01 00:00:00.000000"),
    (pa.timestamp("us", tz="Mars/Olympus"), 0, "1970-01-01 00:00:00.000000"),
    (pa.timestamp("us"), -(10**17), "-1199-02-15 14:13:20.000000"),
    (pa.timestamp("us"), FAR, None),
    (pa.date32(), 19000, "2022-01-08"),
    (pa.date32(), 2**31 - 1, None),
    (pa.time64("ns"), 5, "00:00:00.000000005"),
    (pa.duration("s"), FAR, str(FAR)),
    (pa.duration("ns"), 1_234_567_891, "1234567891"),
]


@pytest.mark.parametrize(("kind", "value", "text"), TIMES, ids=str)
def test_no_time_inside_a_cell_can_fail(kind: pa.DataType, value: int, text: str | None) -> None:
    message = pa.struct([("role", pa.string()), ("at", kind)])
    for holder in (pa.list_(message), pa.large_list(message), pa.list_(message, 1)):
        ((found,),) = arrow_values.values(pa.array([[{"role": "user", "at": value}]], holder))
        assert found == {"role": "user", "at": text}


def test_times_are_text_where_they_have_one() -> None:
    new_york = pa.array([0, None], pa.timestamp("s", tz="America/New_York"))
    assert arrow_values.values(new_york) == ["1969-12-31 19:00:00-0500", None]
    assert arrow_values.values(pa.array([19000, None], pa.date32())) == ["2022-01-08", None]
    for kind, value in ((pa.date32(), 2**31 - 1), (pa.duration("s"), 1), (pa.timestamp("s", tz="Mars/X"), 0)):
        with pytest.raises(ValueError, match=r"out of range|duration|Mars/X"):
            arrow_values.values(pa.array([value], kind))


def test_null_inside_a_cell_is_absent() -> None:
    arguments = pa.struct([("city", pa.string()), ("order", pa.struct([("id", pa.string())]))])
    column = pa.array(
        [[{"city": "Oslo", "order": None}], [{"city": None, "order": {"id": None}}]], pa.list_(arguments)
    )
    assert arrow_values.values(column) == [[{"city": "Oslo"}], [{"order": {}}]]


def test_maps_and_dictionaries() -> None:
    messages = pa.list_(pa.map_(pa.string(), pa.string()))
    value = [[("role", "user"), ("content", "hi")]]
    assert arrow_values.values(pa.array([value], messages)) == [[{"role": "user", "content": "hi"}]]
    assert arrow_values.values(pa.array(["a", "b", "a"]).dictionary_encode()) == ["a", "b", "a"]
    assert arrow_values.values(pa.array(["a", None], pa.large_string())) == ["a", None]


def load(folder: Path, table: pa.Table) -> list[Any]:
    pq.write_table(table, folder / "rows.parquet")
    examples = dataset.load(DataSource(folder=folder)).examples
    return [[turn["content"] for turn in example.messages] or example.text for example in examples]


@pytest.mark.parametrize(("kind", "value", "_text"), TIMES, ids=str)
def test_column_that_is_not_used_is_not_converted(
    tmp_path: Path, kind: pa.DataType, value: int, _text: str | None
) -> None:
    column = pa.array([value], kind)
    pair = pa.table({"prompt": ["q"], "completion": ["a"], "x": column})
    assert load(tmp_path, pair) == [["q", "a"]]
    struct = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["q"]), column], ["role", "content", "x"]
    )
    answer = pa.StructArray.from_arrays(
        [pa.array(["assistant"]), pa.array(["a"]), column], ["role", "content", "x"]
    )
    both = pa.concat_arrays([struct, answer])
    talk = pa.table({"messages": pa.ListArray.from_arrays([0, 2], both)})
    assert load(tmp_path, talk) == [["q", "a"]]


def test_union_of_columns_is_read_row_by_row(tmp_path: Path) -> None:
    message = pa.struct([(name, pa.string()) for name in ("role", "content", "from", "value")])
    openai = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = {
        "messages": pa.array([openai, sharegpt, None, None, None], pa.list_(message)),
        "prompt": pa.array([None, None, "q", "q", None], pa.string()),
        "completion": pa.array([None, None, "a", None, None], pa.string()),
        "response": pa.array([None, None, None, "a", None], pa.string()),
        "text": pa.array([None, None, None, None, "plain"], pa.string()),
    }
    assert load(tmp_path, pa.table(rows)) == [["q", "a"]] * 4 + ["plain"]


def test_row_of_nulls_is_named_and_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    nulls = pa.table({"prompt": ["q", None], "completion": ["a", None], "text": pa.nulls(2, pa.string())})
    with pytest.raises(
        DataError, match=r"rows.parquet: row 2 columns 'prompt', 'completion', 'text' are empty"
    ):
        load(tmp_path, nulls)
    twice = pa.Table.from_arrays(
        [pa.array(["q"]), pa.array(["r"]), pa.array(["a"])], ["prompt", "prompt", "completion"]
    )
    with pytest.raises(DataError, match=r"rows.parquet: row 1: column 'prompt' is there twice"):
        load(tmp_path, twice)


def test_arguments_of_calls_do_not_get_the_keys_of_others(tmp_path: Path) -> None:
    """A column of objects has the keys of all calls in each of them."""

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        tool = {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {"properties": {key: {"type": "string"} for key in arguments}},
            },
        }
        call = {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        asked = {"role": "user", "content": "q", "tool_calls": None}
        return {
            "messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [tool],
        }

    pq.write_table(
        pa.Table.from_pylist([row("f", {"city": "Oslo"}), row("g", {"order": "B1"})]),
        tmp_path / "rows.parquet",
    )
    examples = dataset.load(DataSource(folder=tmp_path)).examples
    for example, name, arguments in zip(examples, "fg", ({"city": "Oslo"}, {"order": "B1"}), strict=True):
        (call,) = example.messages[1]["tool_calls"]
        assert call["function"] == {"name": name, "arguments": arguments}
        assert list(example.tools[0]["function"]["parameters"]["properties"]) == list(arguments)
