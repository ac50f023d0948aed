"""Rows of every common shape become examples."""

import json
from typing import Any

import pytest

from runtime.tuning.data.normalise import normalise
from runtime.tuning.settings import DataSource

PAIR = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
MESSAGES = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]


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
    assert normalise(row, DataSource(), "row 1").messages == PAIR


def test_text_column_is_an_example_of_plain_text() -> None:
    example = normalise({"text": "once"}, DataSource(), "row 1")
    assert (example.messages, example.text) == ((), "once")


def test_input_and_context_go_under_the_question() -> None:
    for row in (
        {"instruction": "sum up", "input": "long", "output": "a"},
        {"question": "sum up", "context": "long", "answer": "a"},
    ):
        assert normalise(row, DataSource(), "").messages[0]["content"] == "sum up\n\nlong"


def test_column_settings_choose_columns() -> None:
    row = {"text": "t", "ask": "q", "reply": "a", "talk": MESSAGES}
    columns = DataSource(context_column="ask", response_column="reply")
    assert normalise(row, columns, "").messages == PAIR
    assert normalise(row, DataSource(messages_column="talk"), "").messages == PAIR
    assert normalise(row, DataSource(response_column="reply", context_column="ask"), "").messages == PAIR
    assert normalise({"body": "b"}, DataSource(response_column="body"), "").text == "b"
