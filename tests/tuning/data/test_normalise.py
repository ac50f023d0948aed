"""Rows of every common shape become examples, and a bad one is named."""

import json
from typing import Any

import pytest

from runtime.errors import DataError
from runtime.tuning.data import literals
from runtime.tuning.data.example import Example
from runtime.tuning.data.normalise import RowNormaliser
from runtime.tuning.settings import DataSource

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
MESSAGES = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def example(row: dict[str, Any], **settings: Any) -> Example:
    return RowNormaliser(DataSource(**settings)).example(row, "rows: row 1")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"speaker": "User", "text": "q"}, {"speaker": "Bot", "text": "a"}]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "", "input": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": MESSAGES[:1], "completion": "a"},
        {"prompt": "q", "completion": MESSAGES[1:]},
        {"prompt": "q", "completion": ["a"]},
        {"question": "q", "answer": "a"},
        {"Question": "q", "Answer": "a", "id": 7},
        {" question": "q", "answer ": "a"},
        {"question": "q", "answers": {"text": ["a", "another"], "answer_start": [0, 3]}},
        {"query": "q", "response": "a"},
        {"problem": "q", "solution": "a"},
        {"inputs": "q", "targets": "a"},
        {"input": "q", "output": "a"},
        {"user": "q", "assistant": "a"},
        {"messages": ["q", "a"]},
        {
            "contents": [
                {"role": "user", "parts": [{"text": "q"}]},
                {"role": "model", "parts": [{"text": "a"}]},
            ]
        },
        {"messages": json.dumps(MESSAGES)},
        {"messages": json.dumps(json.dumps(MESSAGES))},
        {"conversation": {"messages": MESSAGES, "id": 3}, "lang": "en"},
        {"history": "[]", "question": "q", "answer": "a"},
        {"messages": repr(MESSAGES)},
        {"row_idx": 0, "row": {"prompt": "q", "completion": "a"}},
        {"example": {"prompt": "q", "completion": "a"}},
        {"__key__": "7", "json": {"prompt": "q", "completion": "a"}},
        {"prompt": "q", "completion": "a", "label": True, "a": "x"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": MESSAGES, "rejected": MESSAGES},
        {"chosen": MESSAGES, "rejected": MESSAGES},
        {"prompt": b"q", "completion": b"a"},
        {"prompt": "q", "completion": "a", "score": float("nan"), "image": "https://shop/1.png"},
    ],
    ids="-".join,
)
def test_known_columns_become_messages(row: dict[str, Any]) -> None:
    assert example(row).messages == (Q, A)


@pytest.mark.parametrize(
    "text",
    [
        '{"speaker": "bot", "text": "hello"}',
        '{"from": "bob@example.org", "text": "hello"}',
        '{"role": "user", "content": "classify me"}',
        json.dumps(MESSAGES),
        repr(MESSAGES),
    ],
)
def test_text_of_a_question_or_an_answer_stays_text(text: str) -> None:
    for row in ({"instruction": text, "output": text}, {"prompt": [text], "completion": [text]}):
        found = example(row).messages
        assert [turn["content"] for turn in found] == [text, text]
    assert example({"prompt": "q", "chosen": text, "rejected": "b"}).messages[1]["content"] == text


def test_text_of_messages_that_stays_text_is_said() -> None:
    normaliser = RowNormaliser(DataSource())
    for text in (json.dumps(MESSAGES), '{"speaker": "bot", "text": "hello"}', "plain"):
        normaliser.example({"prompt": text, "completion": "a"}, "row 1")
    (note,) = normaliser.facts().notes
    assert note.startswith("a question or an answer that is the text of a list of messages was taken as text")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, "prompt": "q", "completion": "a"},
        {"messages": MESSAGES, "prompt": None, "completion": None},
        {"messages": [], "prompt": "q", "completion": "a", "text": None},
        {"prompt": "q", "completion": None, "response": "a"},
        {"prompt": None, "completion": None, "question": "q", "answer": "a"},
        {"prompt": None, "question": "q", "answer": "a"},
        {"instruction": None, "output": "", "messages": MESSAGES},
        {"prompt": float("nan"), "completion": float("nan"), "question": "q", "answer": "a"},
    ],
)
def test_null_is_absent_in_a_union_of_columns(row: dict[str, Any]) -> None:
    assert example(row).messages == (Q, A)


def test_answers_marked_as_bad_are_taken_where_the_column_is_set() -> None:
    assert example({"prompt": "q", "completion": "a", "label": 0}, response_column="completion").messages
    assert example({"messages": MESSAGES, "label": False}, messages_column="messages").messages == (Q, A)
    with pytest.raises(DataError, match="column 'images'"):
        example({"messages": MESSAGES, "images": ["a.png"]}, messages_column="messages")


def test_choices_are_left_out_where_the_columns_are_set() -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": "a"}
    assert example(row, context_column="question", response_column="answer").messages == (Q, A)


def test_text_column_is_an_example_of_plain_text() -> None:
    for row in ({"text": "once"}, {"text": "once", "prompt": None, "completion": None}):
        assert (example(row).messages, example(row).text) == ((), "once")
    labelled = {"text": "once", "label": "story"}
    assert example(labelled, response_column="text").text == "once"
    classified = example(labelled, context_column="text", response_column="label").messages
    assert [turn["content"] for turn in classified] == ["once", "story"]


def test_input_and_context_go_under_the_question() -> None:
    for row in (
        {"instruction": "sum up", "input": "long", "output": "a"},
        {"question": "sum up", "context": "long", "answer": "a"},
        {"question": "sum up", "passage": "long", "answer": "a"},
    ):
        assert example(row).messages[0]["content"] == "sum up\n\nlong"
    row = {"instruction": "sum up", "input": "long", "reply": "a"}
    assert example(row, response_column="reply").messages[0]["content"] == "sum up\n\nlong"


@pytest.mark.parametrize(
    ("answer", "text"), [(4, "4"), (0, "0"), (0.5, "0.5"), (True, "true"), (False, "false")]
)
def test_numbers_and_booleans_are_answers(answer: float, text: str) -> None:
    assert example({"question": answer, "answer": answer}).messages == (
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    )


@pytest.mark.parametrize("name", ["system", "system_prompt", "System_Message", "systemInstruction"])
def test_system_column_comes_first(name: str) -> None:
    for row in (
        {"prompt": "q", "completion": "a"},
        {"messages": MESSAGES},
        {"messages": [SYSTEM, *MESSAGES]},
    ):
        assert example({name: "s", **row}).messages == (SYSTEM, Q, A)
        assert example({name: "", **row}).messages[-2:] == (Q, A)
        for parts in ([{"text": "s"}], {"role": "system", "parts": [{"text": "s"}]}):
            assert example({name: parts, **row}).messages == (SYSTEM, Q, A)


@pytest.mark.parametrize(
    "history",
    [
        [["q0", "a0"]],
        [("q0", "a0")],
        '[["q0", "a0"]]',
        [{"user": "q0", "assistant": "a0"}],
        [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}],
    ],
)
def test_history_column_comes_before_the_question(history: Any) -> None:
    row = {"system": "s", "history": history, "instruction": "q", "input": "", "output": "a"}
    contents = [turn["content"] for turn in example(row).messages]
    assert contents == ["s", "q0", "a0", "q", "a"]
    weighted = {"messages": [Q, {**A, "weight": 0}, Q, A], "history": history}
    assert example(weighted).untrained == {3}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A, Q], "response": "final"},
        {"messages": [Q, A, Q], "completion": [{"role": "assistant", "content": "final"}]},
        {"conversation": ["q", "a", "q"], "answer": "final"},
        {"messages": json.dumps([Q, A, Q]), "output": "final"},
    ],
    ids="-".join,
)
def test_answer_beside_messages_that_end_with_a_question_is_their_last(row: dict[str, Any]) -> None:
    found = example(row)
    assert found.messages == (Q, A, Q, {**A, "content": "final"})
    assert found.untrained == set()


def test_answer_beside_messages_that_are_answered_is_not_used() -> None:
    assert example({"messages": MESSAGES, "prompt": "q", "answer": "42"}).messages == (Q, A)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [Q, A, Q], "completion": "good"},
        {"prompt": [Q, A, Q], "completion": [{**A, "content": "good"}]},
        {"prompt": [Q, A, Q], "chosen": [{**A, "content": "good"}], "rejected": [A]},
        {"prompt": [Q, A, Q], "chosen": [Q, A, Q, {**A, "content": "good"}], "rejected": [A]},
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, Q],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
)
def test_answers_within_a_prompt_are_not_trained_on(row: dict[str, Any]) -> None:
    normaliser = RowNormaliser(DataSource())
    found = normaliser.example(row, "row 1")
    assert found.messages == (Q, A, Q, {**A, "content": "good"})
    assert found.untrained == {1}
    assert "answers within a prompt are context, and are not trained on" in normaliser.facts().notes


GOOD, BAD = {**A, "content": "good"}, {**A, "content": "bad"}
TRANSCRIPT = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [Q, A, Q, GOOD], "rejected": [Q, A, Q, BAD]},
        {"chosen": json.dumps([Q, A, Q, GOOD]), "rejected": json.dumps([Q, A, Q, BAD])},
        {"chosen": repr([Q, A, Q, GOOD]), "rejected": "nothing of the kind"},
        {"chosen": f"{TRANSCRIPT}good", "rejected": f"{TRANSCRIPT}bad"},
        {"chosen": [Q, A, Q, GOOD]},
        {"chosen": [Q, A, Q, GOOD], "rejected": [Q, A, Q, GOOD]},
        {"chosen": [Q, A, Q, GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [Q, A, Q, GOOD], "rejected": [Q, A, Q, BAD]},
    ],
)
def test_the_beginning_that_chosen_and_rejected_share_is_context(row: dict[str, Any]) -> None:
    normaliser = RowNormaliser(DataSource())
    found = normaliser.example(row, "row 1")
    assert found.messages == (Q, A, Q, GOOD)
    assert found.untrained == {1}
    assert "answers within a prompt are context, and are not trained on" in normaliser.facts().notes


def test_all_answers_of_a_chosen_conversation_count_from_where_the_other_differs() -> None:
    row = {"chosen": [Q, A, Q, A, Q, GOOD], "rejected": [Q, A, Q, BAD, Q, BAD]}
    assert example(row).untrained == {1}


def test_a_chosen_text_without_its_question_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"row 1 column 'chosen' is a text beside no question.*'prompt'"):
        example({"chosen": "good", "rejected": "bad"})


def test_a_conversation_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, parse = [], literals.parse
    monkeypatch.setattr(literals, "parse", lambda text: read.append(text) or parse(text))
    example({"messages": json.dumps([Q, A, Q]), "answer": "final"})
    assert len(read) == 1


def test_system_column_beside_a_message_that_says_nothing() -> None:
    with pytest.raises(DataError, match="no assistant message"):
        example({"system": "s", "messages": [{"role": "system", "content": None}]})


def test_columns_beside_and_within_an_object_of_messages_are_read() -> None:
    found = example({"conversation": {"messages": MESSAGES, "tools": [TOOL]}, "system": "s"})
    assert (found.messages, found.tools) == ((SYSTEM, Q, A), (TOOL,))


def test_history_that_is_text_is_another_column() -> None:
    row = {"history": "no allergies", "question": "q", "answer": "a"}
    assert example(row).messages == (Q, A)


@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [{"name": "f", "parameters": {}}],
        {"name": "f", "parameters": {}},
        [{"name": "f", "input_schema": {}}],
        [{"type": "function", "name": "f", "parameters": "{}"}],
        [{"type": "function", "function": {"name": "f", "description": None, "parameters": {}}}],
    ],
)
def test_tools_reach_the_example_as_openai_describes_them(column: str, value: Any) -> None:
    assert example({"messages": MESSAGES, column: value}).tools == (TOOL,)


def test_no_tools_are_none() -> None:
    for value in ([], "", "[]", None):
        assert example({"messages": MESSAGES, "tools": value}).tools == ()


def test_answer_that_is_a_list_of_calls_calls_the_tools() -> None:
    """The shape of Salesforce's xlam-function-calling data."""
    answers = json.dumps([{"name": "f", "arguments": {"x": 1}}])
    found = example({"query": "q", "tools": json.dumps([TOOL]), "answers": answers})
    (call,) = found.messages[1]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}
    assert example({"query": "q", "answers": answers}).messages[1]["content"] == answers


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "Complex_CoT"])
def test_reasoning_column_is_the_thought_of_the_answer(name: str) -> None:
    thought = {**A, "reasoning_content": "because"}
    for value in ("because", [{"type": "text", "text": "because"}]):
        assert example({"question": "q", name: value, "answer": "a"}).messages[1] == thought
    for value in (True, 3, ""):
        assert example({"question": "q", name: value, "answer": "a"}).messages[1] == A
    answered = example({"messages": [Q], name: "because", "answer": "a"})
    assert answered.messages[1] == thought


def test_column_settings_choose_columns() -> None:
    row = {"text": "t", "ask": "q", "reply": "a", "talk": MESSAGES}
    assert example(row, context_column="ask", response_column="reply").messages == (Q, A)
    assert example(row, messages_column="talk").messages == (Q, A)
    assert example(row, messages_column="TALK").messages == (Q, A)
    assert example({"ask": "q", "completion": "a"}, context_column="ask").messages == (Q, A)
    assert example({"question": "q", "reply": "a"}, response_column="reply").messages == (Q, A)
    assert example({"body": "b"}, response_column="body").text == "b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": "x"}, "no known columns (has foo); expected messages|"),
        ({}, "no known columns (has none)"),
        ({"prompt": "x"}, "no known columns (has prompt)"),
        ({"messages": None}, "column 'messages' is empty"),
        ({"messages": None, "text": ""}, "columns 'messages', 'text' are empty"),
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": "[]"}, "column 'messages' is an empty list, expected a list of messages"),
        ({"messages": "hello"}, "column 'messages' is 'hello', expected a list of messages"),
        ({"messages": ["hi", "yo", "hm"]}, "a list of 3 texts, expected objects with role and content"),
        ({"conversation": ["hi", "yo"], "response": "r"}, "with another answer in 'response'"),
        ({"messages": [Q], "response": {"a": 1}}, "column 'response' is a mapping"),
        ({"messages": ["hi", {"a": 1}]}, "message 1 is 'hi', expected an object with role and content"),
        ({"messages": Q}, "no assistant message"),
        ({"messages": [Q]}, "no assistant message"),
        ({"messages": [Q, {**A, "weight": 0}]}, "excludes all its assistant messages"),
        ({"prompt": "q", "completion": " "}, "column 'completion' is empty"),
        ({"prompt": "q", "completion": None, "text": "formatted"}, "column 'completion' is empty"),
        ({"prompt": None, "completion": "a"}, "column 'prompt' is empty"),
        ({"prompt": "q", "completion": ["a", "b"]}, "of its 2 items each needs a row of its own"),
        ({"prompt": "q", "completion": {"a": 1}}, "write it as JSON text if"),
        ({"instruction": "q", "input": ["x", "y"], "output": "a"}, "column 'input' is a list"),
        ({"prompt": "q", "completion": b"\xff"}, "is binary and not UTF-8 text (byte 0)"),
        ({"prompt": "q", "completion": "a \ud83d"}, "holds \\ud83d, half of a character, at 2"),
        ({"question": "q", "answers": {"text": []}}, "column 'answers' is empty"),
        ({"text": "t", "label": "x"}, "set context_column text and response_column label"),
        ({"text": "t", "label": 0}, "response_column text alone"),
        *(
            (
                {"text": "t", name: "x"},
                f"set context_column text and response_column {name} to train on '{name}'",
            )
            for name in ("output", "response", "answer", "completion", "summary", "target", "intent")
        ),
        ({"text": "t", "category": "x", "prompt": "q"}, "'text' and 'category'"),
        ({"prompt": "q", "text": "t"}, "set context_column prompt and response_column text"),
        ({"text": "hi", "role": "prompter", "parent_id": None}, "is one message (of 'prompter')"),
        ({"prompt": "q", "completion": "a", "label": False}, "label false, which marks a bad answer"),
        ({"prompt": "q", "completion": "a", "label": 0}, "set response_column completion to take all"),
        ({"prompt": "q", "completion": "a", "label": "0"}, "label 0, which marks a bad answer"),
        ({"messages": MESSAGES, "label": False}, "set messages_column messages to take all"),
        ({"question": "q", "answer": "a", "desirable": False}, "desirable false, which marks a bad answer"),
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, "has column 'choices', which the question"),
        ({"question": "q", "A": "x", "B": "y", "answer": "B"}, "has column 'A', which the question"),
        (
            {"question": "q", "options": {"A": "x"}, "answer": "A"},
            "set context_column question and response_c",
        ),
        ({"id": 1, "usage": {"input": 5, "output": 7}}, "no known columns (has id, usage)"),
        (
            {"passage": "real", "source": {"title": "t", "text": "x"}},
            "no known columns (has passage, source)",
        ),
        (
            {"id": 1, "data": {"text": "t"}, "annotations": [{}]},
            "no known columns (has id, data, annotations)",
        ),
        (
            {"system": "s", "messages": [{**SYSTEM, "content": "t"}, *MESSAGES]},
            "two different system messages",
        ),
        ({"messages": MESSAGES, "images": ["a.png"]}, "column 'images': only text is trained on"),
        ({"messages": MESSAGES, "image": {"bytes": b"x", "path": None}}, "column 'image'"),
        ({"prompt": "<image> what?", "completion": "a", "image": "a.png"}, "column 'image'"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"thinking": True}}, "'chat_template_kwargs'"),
        ({"messages": MESSAGES, "tools": ["hammer"]}, "tool 1 is 'hammer', expected a function"),
        ({"messages": MESSAGES, "tools": "none"}, "is 'none', expected a list of tools"),
        ({"custom_id": "1", "body": {"messages": [Q]}}, "column 'body' column 'messages' has no assistant"),
    ],
)
def test_bad_row_says_what_is_wrong_with_it(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        example(row)
    assert str(caught.value).startswith("rows: row 1")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"messages_column": "talk"}, "no column 'talk' (messages_column; has prompt, completion, note)"),
        ({"context_column": "ask"}, "no column 'ask' (context_column"),
        ({"response_column": "reply"}, "no column 'reply' (response_column"),
        ({"response_column": "note"}, "column 'note' is empty"),
    ],
)
def test_column_that_is_set_must_be_there(settings: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        example({"prompt": "q", "completion": "a", "note": None}, **settings)
    assert message in str(caught.value)


def test_every_accepted_shape_is_in_the_error() -> None:
    with pytest.raises(DataError) as caught:
        example({"foo": "x"})
    shapes = (
        "messages",
        "conversations",
        "instruction/output",
        "prompt/completion",
        "question/answer",
        "query",
    )
    assert all(shape in str(caught.value) for shape in [*shapes, "messages_column", "response_column"])


def test_facts_say_which_columns_were_used() -> None:
    normaliser = RowNormaliser(DataSource())
    rows: list[dict[str, Any]] = [
        {"instruction": "q", "input": "x", "output": "a", "id": 1},
        {"instruction": "q", "input": "y", "output": "a", "id": 2},
        {"conversations": [{"from": "human", "value": "q", "at": 3}, A], "system": "s", "source": "web"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "history": ""},
    ]
    for number, row in enumerate(rows, start=1):
        normaliser.example(row, f"row {number}")
    facts = normaliser.facts()
    assert {str(columns): count for columns, count in facts.columns.items()} == {
        "question from instruction + input, answer from output": 2,
        "messages from conversations, system from system": 1,
        "question from prompt, answer from chosen": 1,
    }
    assert facts.unused == ("id", "source", "rejected")
    assert facts.ignored_fields == ("at",)
    assert [(count, note.split(":")[0]) for note, count in facts.notes.items()] == [(1, "preference data")]


def test_only_the_cells_of_used_columns_are_asked_for() -> None:
    class Row(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            assert name != "until", "a column that is not used was converted"
            return super().__getitem__(name)

    assert example(Row(prompt="q", completion="a", until=object())).messages == (Q, A)
    assert example(Row(messages=MESSAGES, until=object())).messages == (Q, A)
