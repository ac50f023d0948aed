"""Lists as NumPy, pandas and Python print them into CSV files are read, and texts in them left alone."""

import csv
import io
from typing import Any

import numpy as np
import pandas as pd
import pytest

from runtime.tuning.data import literals
from tests.costs import assert_linear

TURNS = [
    {"role": "user", "content": "{a} {b} 'c' \"d\" ] ["},
    {"role": "assistant", "content": "array([1], dtype=object)\n} {"},
]


def array(items: list[Any]) -> Any:
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (array(TURNS), TURNS),
        (array([{"r": "u"}, {"r": "a"}]), [{"r": "u"}, {"r": "a"}]),
        ({"turns": array(TURNS)}, {"turns": TURNS}),
        (
            [{"role": "user", "content": array([{"text": "q"}])}],
            [{"role": "user", "content": [{"text": "q"}]}],
        ),
        (array([array(["q", "a"]), array(["r", "b"])]), [["q", "a"], ["r", "b"]]),
        (array(["hi", "yo"]), ["hi", "yo"]),
        (array([["q", "a"], ["r", "b"]]), [["q", "a"], ["r", "b"]]),
        (array([]), []),
        (array([{"content": "nan", "weight": float("nan")}]), [{"content": "nan", "weight": None}]),
    ],
    ids=str,
)
def test_cell_that_pandas_writes_is_read(cell: Any, value: Any) -> None:
    target = io.StringIO()
    pd.DataFrame({"cell": [cell]}).to_csv(target, index=False)
    (_, (text,)) = csv.reader(io.StringIO(target.getvalue()))
    assert literals.parse(text) == value
    assert literals.parse(repr(value)) == value


@pytest.mark.parametrize("text", ["['a' ... 'b']", "['a' b]", "[array(1)", "['unended", "['\\", "[f(1)]"])
def test_what_is_no_literal_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="neither JSON nor a Python literal"):
        literals.parse(text)


@pytest.mark.parametrize("piece", ["\\'", "'\"", "} ", "array(", " ", '"\\'])
def test_time_grows_with_the_length(piece: str) -> None:
    def parse(pieces: int) -> None:
        with pytest.raises(ValueError, match="literal"):
            literals.parse("['" + piece * pieces)

    assert_linear(parse, 5_000, 80_000)
