"""JSON is read in every form in which tools write rows, and a broken row is one row."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from runtime.errors import DataError
from runtime.tuning.data.formats import read

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(folder: Path, text: str | bytes, name: str = "a.json") -> list[Any]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read(path))


def pandas(**options: Any) -> str:
    target = io.StringIO()
    pd.DataFrame(ROWS).to_json(target, **options)
    return target.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        LINES,
        LINES.replace("\n", "\r\n\r\n"),
        LINES.replace("\n", "\r"),
        "\ufeff \n" + LINES,
        LINES.replace("{", "\ufeff{"),
        LINES.replace("\n", ""),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "tags": ["x"], "data": ROWS}),
        json.dumps({"version": "1", "tags": ["x"], "data": ROWS}, indent=1),
        json.dumps({"features": [{"name": "prompt"}], "rows": ROWS}),
        json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
        pandas(),
        pandas(orient="split"),
        pandas(orient="index"),
        pandas(orient="table"),
        pandas().replace('"0"', '"-1"'),
        json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}),
        json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}, indent=1),
        pandas(orient="records"),
        pandas(orient="records", lines=True),
        json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:]),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path: Path, text: str) -> None:
    found = [{name: row[name] for name in ROWS[0]} for row in rows_of(tmp_path, text)]
    assert found == ROWS


def test_pandas_columns_with_an_index_of_texts_are_refused_with_the_form_to_write(tmp_path: Path) -> None:
    text = pd.DataFrame(ROWS, index=["a", "b", "c"]).to_json()
    with pytest.raises(DataError, match=r"to_json\(orient='records', lines=True\)"):
        rows_of(tmp_path, text)


def test_utf_16_and_utf_32_with_a_mark_are_read(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert rows_of(tmp_path, LINES.encode(encoding)) == ROWS
    with pytest.raises(DataError, match="UTF-16 or UTF-32 text without a byte order mark: save it as UTF-8"):
        rows_of(tmp_path, LINES.encode("utf-16-le"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}], "tools": [{"type": "function"}]},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {
            "question": "q",
            "answer": "a",
            "passages": [{"title": "t", "text": "p"}, {"title": "t", "text": "p"}],
        },
        {"prompt": {"text": "q"}, "completion": {"text": "a"}},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_that_is_a_row_is_one_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    assert rows_of(tmp_path, json.dumps(row, indent=indent)) == [row]


def test_a_line_of_json_lines_is_a_row_whatever_it_holds(tmp_path: Path) -> None:
    row = {"version": 1, "data": ROWS}
    assert rows_of(tmp_path, json.dumps(row), "a.jsonl") == [row]
    assert rows_of(tmp_path, f"{json.dumps(row)}\n{json.dumps(row)}") == [row, row]


def test_lines_end_at_line_feeds_only_and_nan_is_a_number(tmp_path: Path) -> None:
    text = '{"prompt":"a\u2028b\u0085c\x0bd","score":NaN}\n'.replace("\x0b", "\\u000b")
    (row,) = rows_of(tmp_path, text, "a.jsonl")
    assert row["prompt"] == "a\u2028b\u0085c\x0bd"
    assert row["score"] != row["score"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt":"q","compl', "is not valid JSON: Unterminated string starting at character 14"),
        (b"5", "is 5, expected an object"),
        (b"null", "expected an object"),
        (b'{"prompt":"caf\xe9"}', "is not UTF-8 text (byte 0xe9"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n":' + b"1" * 5000 + b"}", "a number has too many digits"),
        (b'{"prompt":"a\0b"}', "Invalid control character"),
        (b'{"prompt":"q"} rest', "is not valid JSON"),
    ],
)
def test_a_broken_line_is_one_bad_row_first_or_later(tmp_path: Path, line: bytes, reason: str) -> None:
    first, *rest = LINES.encode().splitlines()
    for number, lines in enumerate(([line, first, *rest], [first, line, *rest], [first, *rest, line])):
        if number == 0 and line.startswith(b"["):
            continue  # begins a list
        found = rows_of(tmp_path, b"\n".join(lines), "a.jsonl")
        bad = [row for row in found if isinstance(row, DataError)]
        assert [reason in str(row) for row in bad] == [True]
        assert [row for row in found if row not in bad] == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "not a JSON file; it starts with b'hello'"),
        ('{\n "data": [\n  {"a": 1},,\n', "not valid JSON: Expecting value (line 3)"),
        ('[{"a": 1}, {"a": 2}', "is not valid JSON: '', expected ',' or ']'"),
        ('[{"a": 1}', "is not valid JSON: '', expected ',' or ']'"),
        ('[{"a": "x', "is not valid JSON: Unterminated string"),
        ('[{"a": 1}] x', "'x' after the end of the list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"train": [{"a": 1}], "test": [{"a": 1}]}', "holds 2 lists of objects (train, test), expected one"),
        ('{"a": ["x"], "b": ["x", "y"]}', "columns of different lengths (a 1, b 2)"),
    ],
)
def test_a_broken_file_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        '{"a" 2}',
        '{"a": {"b": [1, 2}, "c": "x, ]"}',
        '{"a": "he said \\", ]} x" y}',
        '{"a": ' + "1" * 5000 + "}",
        "{'a': 1}",
        "nope",
        "",
        '{"a": 1} {"a": 2}',
    ],
)
@pytest.mark.parametrize("chunk", [13, 1 << 20])
def test_a_broken_item_of_a_list_is_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, chunk: int
) -> None:
    monkeypatch.setattr("runtime.tuning.data.formats.json_rows.CHUNK_BYTES", chunk)
    first, second, third = map(json.dumps, ROWS)
    found = rows_of(tmp_path, f"[{first}, {broken}, {second}, {third}]")
    bad = [row for row in found if isinstance(row, DataError)]
    assert len(bad) == 1
    assert str(bad[0]).startswith("is not valid JSON: ")
    assert [row for row in found if row in ROWS] == ROWS


def test_what_follows_an_item_that_hides_its_end_is_not_read(tmp_path: Path) -> None:
    text = f'[{json.dumps(ROWS[0])}, {{"a": "x}}, {json.dumps(ROWS[1]).replace(chr(34), "")}]'
    with pytest.raises(DataError, match="is not valid JSON: Unterminated string"):
        rows_of(tmp_path, text)


def test_a_list_is_read_item_by_item_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": number, "text": "ä😀\\" * (number % 7)} for number in range(500)]
    for ascii_only in (True, False):
        monkeypatch.setattr("runtime.tuning.data.formats.json_rows.CHUNK_BYTES", 13)
        assert rows_of(tmp_path, json.dumps(rows, ensure_ascii=ascii_only)) == rows
    monkeypatch.undo()
    long = [{"text": "x" * (3 << 20)}, 12345, {"text": "y"}]
    found = rows_of(tmp_path, json.dumps(long))
    assert (found[0], found[2]) == (long[0], long[2])
    assert str(found[1]) == "is 12345, expected an object"


def test_a_list_that_breaks_later_has_given_its_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 5000}] * 1000)[:-1] + ", {")
    found = read(path)
    assert next(found) == {"text": "x" * 5000}
    with pytest.raises(DataError, match="is not valid JSON"):
        list(found)


def test_an_empty_text_has_no_rows(tmp_path: Path) -> None:
    for text in ("", " \n", "[]"):
        assert rows_of(tmp_path, text) == []


def test_values_of_split_form_that_do_not_fit_are_bad_rows(tmp_path: Path) -> None:
    (bad, good) = rows_of(tmp_path, '{"columns": ["a", "b"], "data": [[1], [1, 2]]}')
    assert "expected 2 values" in str(bad)
    assert good == {"a": 1, "b": 2}


def test_lines_that_are_all_broken_are_bad_rows(tmp_path: Path) -> None:
    found = rows_of(tmp_path, '{"a": 1\n{"b\nc\n', "a.jsonl")
    assert [type(row) for row in found] == [DataError] * 3
