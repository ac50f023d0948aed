"""Messages in every form become what chat templates know, and what is not done is refused by name."""

import json
from typing import Any

import pytest

from runtime.errors import DataError
from runtime.tuning.data import conversation
from runtime.tuning.data.conversation import RowConversation
from tests.costs import assert_linear

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}


def read(*messages: Any) -> RowConversation:
    return conversation.read(list(messages), "row 1")


@pytest.mark.parametrize(
    "value",
    [
        {"role": ["user", "assistant"], "content": ["q", "a"]},
        {"from": ["human", "gpt"], "value": ["q", "a"], "note": None},
        [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]],
        [json.dumps(Q), json.dumps(A)],
        json.dumps([Q, A]),
        json.dumps(json.dumps([Q, A])),
        repr([Q, A]),
        "[{'role': 'user', 'content': 'q'} {'role': 'assistant', 'content': 'a'}]",
        "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]",
        [{"user": "q", "assistant": "a"}],
        [{"system": "", "input": "q", "output": "a"}],
        [{"type": "human", "content": "q"}, {"type": "ai", "content": "a", "tool_calls": []}],
        [{"type": "human", "data": {"content": "q", "name": None}}, {"type": "ai", "data": {"content": "a"}}],
        [{"Role": "User", "Content": "q"}, {"ROLE": "Assistant", "content": "a"}],
        [{"role": "user", "content": "q", "from": None}, {"role": None, "from": "gpt", "value": "a"}],
    ],
)
def test_containers_of_messages(value: Any) -> None:
    assert conversation.read(value, "row 1").messages == [Q, A]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "user") for name in ("user", "human", "prompter", "USER", "Human")),
        *((name, "assistant") for name in ("assistant", "gpt", "ai", "bot", "model", "Assistant")),
        *((name, "tool") for name in ("tool", "function", "observation", "ipython", "tool-response")),
        ("system", "system"),
        ("developer", "developer"),
    ],
)
def test_roles_by_the_names_of_data_sets(name: str, role: str) -> None:
    assert read({"from": name, "value": "x"}).messages[0]["role"] == role


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "hi"}, {"type": "text", "text": " you"}], "hi you"),
        ([{"type": "input_text", "text": "hi"}, " you"], "hi you"),
        ([{"text": "hi", "type": None}], "hi"),
        ({"type": "text", "text": "hi"}, "hi"),
        (["hi"], "hi"),
        (3, "3"),
        (True, "true"),
    ],
)
def test_contents_are_text(content: Any, text: str) -> None:
    for role in ("user", "assistant", "tool"):
        assert read({"role": role, "content": content}).messages[0]["content"] == text


def test_result_of_a_tool_may_be_any_json() -> None:
    for result in ({"status": "shipped", "näher": 1}, [{"day": 1}, {"day": 2}]):
        (turn,) = read({"role": "tool", "content": result}).messages
        assert turn["content"] == json.dumps(result, ensure_ascii=False)


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}]},
        {"tool_calls": [{"id": "c1", "name": "f", "arguments": {"city": "Oslo"}}]},
        {"tool_calls": {"id": "c1", "name": "f", "args": {"city": "Oslo"}}},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps('{"city": "Oslo"}')}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{'city': 'Oslo'}"}}]},
        {"tool_calls": [CALL], "function_call": None},
        {"content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {"city": "Oslo"}}]},
    ],
)
def test_calls_are_what_the_server_gives_to_templates(message: dict[str, Any]) -> None:
    assert read(Q, {"role": "assistant", **message}).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize("arguments", ["", "{}", "null", None, {}])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": arguments}}
    (found,) = read({"role": "assistant", "tool_calls": [call, {"name": "f"}][:1]}).messages[0]["tool_calls"]
    assert found["function"]["arguments"] == {}


def test_arguments_that_are_no_object_become_one() -> None:
    """As the server gives them (serving/http/messages.py)."""
    call = {"id": "c1", "function": {"name": "f", "arguments": '["Oslo"]'}}
    (found,) = read({"role": "assistant", "tool_calls": [call]}).messages[0]["tool_calls"]
    assert found["function"]["arguments"] == {"arguments": ["Oslo"]}


@pytest.mark.parametrize(
    "calling",
    [
        [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}],
        [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}],
        [{"from": "tool_call", "value": '[{"name": "f", "arguments": {}}]'}],
    ],
)
@pytest.mark.parametrize("role", ["function", "observation", "tool", "ipython"])
def test_older_calls_and_their_results_are_tied_by_an_id(calling: list[Any], role: str) -> None:
    found = read(Q, *calling, {"role": role, "name": "f", "content": "5"}, A)
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert found.messages == [
        Q,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5", "name": "f", "tool_call_id": "call00000"},
        A,
    ]
    assert found.notes == {"tool calls without an id were given one"}


def test_calls_that_stand_alone_join_the_answer_before_them() -> None:
    calls = [{"from": "tool_call", "value": json.dumps({"name": name, "arguments": {}})} for name in "fg"]
    found = read(
        Q, A, *calls, {"role": "tool", "name": "g", "content": "2"}, {"role": "tool", "content": "1"}
    )
    assert [turn["role"] for turn in found.messages] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in found.messages[1]["tool_calls"]] == ["f", "g"]
    assert [turn["tool_call_id"] for turn in found.messages[2:]] == ["call00001", "call00000"]


def test_results_keep_their_name_and_id() -> None:
    result = {"role": "tool", "content": "5", "name": "f", "tool_call_id": "c1"}
    assert read(Q, {"role": "assistant", "tool_calls": [CALL]}, result).messages[2] == result
    parts = [{"type": "tool_result", "tool_use_id": "c1", "content": "5"}]
    assert read({"role": "user", "content": parts}).messages == [
        {"role": "tool", "content": "5", "tool_call_id": "c1"}
    ]


THOUGHT = {"role": "assistant", "channel": "analysis", "content": "2+2"}


def test_harmony_analysis_is_the_thought_of_the_answer_after_it() -> None:
    found = read(Q, THOUGHT, {**A, "channel": "final"}, Q, A)
    assert found.messages == [Q, {**A, "reasoning_content": "2+2"}, Q, A]
    assert found.ignored == set()
    called = read(Q, A, THOUGHT, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'})
    assert called.messages[2]["reasoning_content"] == "2+2"
    assert read(Q, {**A, "channel": "web"}).ignored == {"channel"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([Q, THOUGHT], "row 1: a message of channel 'analysis' has no answer after it"),
        ([Q, THOUGHT, Q, A], "row 1 message 3: a message of channel 'analysis' has no answer after it"),
        ([Q, {**THOUGHT, "weight": 0}, A], "row 1 message 2, of channel 'analysis', is marked"),
        ([Q, {**A, "recipient": "functions.f"}], "a call in 'recipient', which is not supported"),
    ],
)
def test_harmony_messages_that_would_be_lost_are_refused(messages: list[Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(*messages)
    assert words in str(caught.value)


def test_time_of_calls_and_their_results_grows_with_their_number() -> None:
    def read_calls(count: int) -> None:
        calls = [{"id": f"c{at}", "name": f"f{at}", "arguments": {}} for at in range(count)]
        results = [{"role": "tool", "name": f"f{at}", "content": "5"} for at in reversed(range(count))]
        found = read(Q, {"role": "assistant", "tool_calls": calls}, *results)
        assert [turn["tool_call_id"] for turn in found.messages[2:]] == [
            f"c{at}" for at in reversed(range(count))
        ]

    assert_linear(read_calls, 500, 8_000)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(name: str) -> None:
    thought = {**A, "reasoning_content": "2+2"}
    assert read(Q, {**A, name: "2+2"}).messages[1] == thought
    assert read(Q, {**A, name: None}).messages[1] == A
    assert read(Q, {**A, name: False}).messages[1] == A
    parts = [{"type": "thinking", "thinking": "2+2"}, {"type": "text", "text": "a"}]
    assert read(Q, {"role": "assistant", "content": parts}).messages[1] == thought


@pytest.mark.parametrize(
    ("field", "value", "trained"),
    [
        ("weight", 0, False), ("weight", 1, True), ("weight", 0.0, False), ("weight", 1.0, True),
        ("train", False, False), ("train", True, True), ("train", "false", False),
        ("training", False, False), ("trainable", False, False), ("loss", False, False), ("loss", True, True),
        ("loss_mask", 0, False), ("loss_mask", 1, True), ("loss_weight", 0, False),
        ("is_trainable", False, False),
        ("masked", True, False), ("mask", True, False), ("masked", False, True), ("weight", None, True),
    ],
)  # fmt: skip
def test_message_that_is_not_to_be_trained_on_is_marked(field: str, value: Any, trained: bool) -> None:
    found = read(Q, {**A, field: value}, Q, A)
    assert found.untrained == (set() if trained else {1})
    assert found.messages == [Q, A, Q, A]


def test_untrained_answer_may_be_empty() -> None:
    assert read(Q, {**A, "content": "", "train": False}).untrained == {1}


def test_tools_of_a_message_and_fields_that_are_not_used() -> None:
    system = {"role": "system", "content": "s", "tools": [{"name": "f", "parameters": {}}], "id": 7}
    found = read(system, Q, A)
    assert found.tools[0]["function"]["name"] == "f"
    assert found.ignored == {"id"}


def test_null_system_message_says_nothing_and_a_refusal_is_an_answer() -> None:
    assert read({"role": "system", "content": None}, Q, A).messages == [Q, A]
    assert read(Q, {"role": "assistant", "content": None, "refusal": "a"}).messages == [Q, A]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"role": "wizard", "content": "x"},
            "has role 'wizard', expected one of system, developer, user, human",
        ),
        ({"content": "x"}, "has role nothing"),
        ({"role": "user"}, "has no content (content, value, text, parts)"),
        ({"role": "user", "content": None}, "has no content"),
        ({"role": "user", "content": {"a": 1}}, "content is a mapping, expected text"),
        ({"role": "assistant", "content": ""}, "is empty: there is nothing to learn"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "is empty: there is nothing to learn"),
        ({**A, "weight": 0.5}, "has weight 0.5, expected 0 or 1"),
        ({**A, "train_detail": [{"begin_offset": 0}]}, "'train_detail', which is not supported"),
        ({**A, "images": ["x"]}, "'images', which is not supported: only text is trained on"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url', which is not"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "only text is trained on"),
        ({"role": "user", "content": [{"type": "video"}]}, "only text is trained on"),
        ({"role": "user", "content": [{"type": "dance"}]}, "expected one of input_text, output_text"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "call 1 does not name its function"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls is 'f()', expected a list of calls"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}, "arguments '{x', expected"),
        ({"from": "function_call", "value": "{}"}, "call 1 does not name its function"),
        ({"role": "user", "content": "cut \ud83d"}, "half of a character"),
    ],
)
def test_message_that_cannot_be_used_says_why(message: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(Q, message)
    assert str(caught.value).startswith("row 1 message 2")
    assert words in str(caught.value)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match=r"different lengths \(2 of role, 1 of content\)"):
        conversation.read({"role": ["user", "assistant"], "content": ["q"]}, "row 1")


def test_deeply_nested_text_is_an_error_of_one_line() -> None:
    deep = "[" * 200 + "]" * 200
    for text in (
        deep,
        "[" * 100_000,
        "[{" * 50_000,
        "[" + "-" * 100_000 + "1]",
        "[" + "'x'," * 2_000_000 + "]",
    ):
        with pytest.raises(DataError, match="expected"):
            conversation.read(text, "row 1")
