"""Separated values are read with the separator that the header has; text that shifts columns is refused."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from runtime.errors import DataError
from runtime.tuning.data.formats import read

ROW = {"prompt": "q", "completion": "a"}


def rows_of(folder: Path, text: str | bytes, name: str = "a.csv") -> list[Any]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read(path))


@pytest.mark.parametrize(
    "text",
    [
        "prompt,completion\nq,a\n",
        "prompt,completion\r\nq,a\r\n",
        "prompt,completion\rq,a\r",
        "prompt;completion\nq;a\n",
        "prompt\tcompletion\nq\ta",
        "prompt|completion\nq|a",
        "\ufeffprompt,completion\nq,a\n",
        "sep=;\nprompt;completion\nq;a\n",
        "\n\nprompt,completion\n\nq,a\n\n",
        "prompt, completion\nq, a\n",
        '"prompt","completion"\n"q","a"\n',
        "prompt,completion,\nq,a,\n",
        "prompt,completion\nq,a,,\n",
    ],
)
def test_separators_line_ends_and_marks(tmp_path: Path, text: str) -> None:
    (row,) = rows_of(tmp_path, text)
    assert {name: row[name] for name in ROW} == ROW


def test_a_separator_that_only_the_text_has_decides_nothing(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "text\na; b; c; d\n") == [{"text": "a; b; c; d"}]
    assert rows_of(tmp_path, 'prompt;completion\n"a, b, c";"d, e, f"\n') == [
        {"prompt": "a, b, c", "completion": "d, e, f"}
    ]
    assert rows_of(tmp_path, "prompt\tcompletion\na, b\tc, d\n", "a.tsv") == [
        {"prompt": "a, b", "completion": "c, d"}
    ]


def test_text_that_pandas_writes_comes_back(tmp_path: Path) -> None:
    texts = [
        'say "hi", you',
        "two\nlines",
        "two\r\nlines",
        "",
        " spaces ",
        "\u2028",
        "back\\slash",
        'ends with \\"',
    ]
    frame = pd.DataFrame({"prompt": texts, "completion": "a"})
    for separator in ",;\t":
        frame.to_csv(tmp_path / "a.csv", sep=separator, index=False, lineterminator="\n")
        assert [row["prompt"] for row in read(tmp_path / "a.csv")] == texts  # type: ignore[index]
    frame.to_csv(tmp_path / "a.csv")  # with an index, whose column has no name
    assert [row["prompt"] for row in read(tmp_path / "a.csv")] == texts  # type: ignore[index]


def test_utf_16_with_a_mark_is_read_and_other_encodings_named(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "prompt,completion\nq,a\n".encode("utf-16")) == [ROW]
    with pytest.raises(
        DataError, match=r"not UTF-8 text \(byte 0xe9 at 23; Windows-1252 or Latin-1, perhaps\)"
    ):
        rows_of(tmp_path, "prompt,completion\nq,café\n".encode("cp1252"))
    with pytest.raises(DataError, match="without a byte order mark"):
        rows_of(tmp_path, "prompt,completion\nq,a\n".encode("utf-16-be"))


def test_a_cell_may_be_of_any_size(tmp_path: Path) -> None:
    long = "a " * 500_000
    assert rows_of(tmp_path, f"prompt,completion\nq,{long}\n") == [{"prompt": "q", "completion": long}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("q", "does not have 2 columns as the header has, but 1"),
        ("q,a,b", "does not have 2 columns as the header has, but 3"),
        ('q,"a" b', "is not valid CSV: "),
        ("q,a\0b", "column 'completion' has a NUL byte"),
    ],
)
def test_a_row_that_does_not_fit_is_one_bad_row(tmp_path: Path, line: str, reason: str) -> None:
    first, bad, last = rows_of(tmp_path, f"prompt,completion\nq,a\n{line}\nq,a\n")
    assert (first, last) == (ROW, ROW)
    assert reason in str(bad)


def test_a_quote_that_is_never_closed_is_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a quote that is opened below line 2 is never closed"):
        rows_of(tmp_path, 'prompt,completion\nq,a\nq,"a\n' + "q,a\n" * 100)
    with pytest.raises(DataError, match="has a quote that is never closed"):
        rows_of(tmp_path, '"prompt,completion\nq,a\n')


def test_quotes_and_backslashes_that_spark_escapes_are_read(tmp_path: Path) -> None:
    text = (
        'prompt,completion\n"say \\"hi\\", you",she said "yes"\n"{\\"a\\": \\"\\\\\\"b\\"}",\\frac\n'
        '"two\nlines","ends with \\\\"\n'
    )
    assert rows_of(tmp_path, text) == [
        {"prompt": 'say "hi", you', "completion": 'she said "yes"'},
        {"prompt": '{"a": "\\"b"}', "completion": "\\frac"},
        {"prompt": "two\nlines", "completion": "ends with \\"},
    ]


def test_a_header_in_the_middle_is_a_bad_row(tmp_path: Path) -> None:
    first, bad, last = rows_of(tmp_path, "prompt,completion\nq,a\nprompt,completion\nq,a\n")
    assert (first, last) == (ROW, ROW)
    assert "is the header again" in str(bad)


def test_a_column_that_is_there_twice_is_refused_and_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns 'prompt'"):
        rows_of(tmp_path, "prompt,prompt,completion\nq,r,a\n")
    assert rows_of(tmp_path, "") == []
    assert rows_of(tmp_path, "prompt,completion\n") == []
