"""Histories as clients replay them, and the turns that templates are given."""

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from runtime.chat_template import TemplateFeatures
from runtime.errors import RequestError
from runtime.serving.http import json_parser, messages
from runtime.serving.http.messages import Messages, turns_of

pytestmark = pytest.mark.anyio

FUNCTION = {"name": "now", "parameters": {"type": "object"}}
KNOWN = TemplateFeatures(roles=TemplateFeatures().roles | {"ipython"})
TOOLS_TEMPLATE = (
    "{{ tools }}{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.reasoning_content }}|"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "({{ k }}={{ v }}){% endfor %}{% endfor %}]{% endfor %}"
)


HISTORY: TypeAdapter[Any] = TypeAdapter(Messages)


def turns(*messages: dict[str, Any], features: TemplateFeatures = KNOWN) -> list[dict[str, Any]]:
    return turns_of(HISTORY.validate_python(list(messages)), features)


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}, **more}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("sent", "given"),
    [
        ('{"x": 1}', {"x": 1}),
        ("", {}),
        ("  ", {}),
        (None, {}),
        ({"x": 1}, {"x": 1}),
        ('{"x": ', {}),
        ('{"x": 1, "y": "par', {"x": 1, "y": "par"}),
        ('{"x": 1, "y": [1, 2', {"x": 1, "y": [1, 2]}),
        ("Paris", {"arguments": "Paris"}),
        ("5", {"arguments": 5}),
        ('["a"]', {"arguments": ["a"]}),
        (["a"], {"arguments": ["a"]}),
        ('"text"', {"arguments": "text"}),
        ('{"x": NaN}', {"arguments": '{"x": NaN}'}),
        ('{"x": "caf\\ud83d", "y": "\\\\ud83d"}', {"x": "caf\ufffd", "y": "\\ud83d"}),
        ('{"x": "caf\\ud83d', {"x": "caf"}),
        ("[" * 5000, {"arguments": "[" * 5000}),
        ("1" * 5000, {"arguments": "1" * 5000}),
    ],
)
def test_arguments_are_a_mapping_for_templates_whatever_was_sent(sent: Any, given: Any) -> None:
    (turn,) = turns(called(sent))
    assert turn["tool_calls"][0]["function"] == {"name": "now", "arguments": given}
    assert turn["content"] == ""


def test_arguments_that_are_missing_are_none() -> None:
    (turn,) = turns({"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]})
    assert turn["tool_calls"] == [
        {"id": "", "type": "function", "function": {"name": "now", "arguments": {}}}
    ]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": None, "tool_calls": []}, ""),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None}, "yes"),
        ({"role": "tool", "tool_call_id": "c", "content": None}, ""),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            "ab",
        ),
        ({"role": "user", "content": ["a", {"text": "b"}, {"type": None, "text": "c"}]}, "abc"),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a", "logprobs": []}]}, "a"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "user", "content": None}, ""),
        ({"role": "system", "content": None}, ""),
        ({"role": "user", "content": [None, "a", {"type": "text", "text": None}, {"text": "b"}]}, "ab"),
        ({"role": "user", "content": [{"type": "text", "text": {"value": "a", "annotations": []}}]}, "a"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "a"),
        ({"role": "assistant", "content": {"x": "é"}}, '{"x": "é"}'),
        ({"role": "assistant", "content": "", "refusal": ["no"]}, "no"),
        ({"role": "assistant", "content": "yes", "refusal": False}, "yes"),
        ({"role": "tool", "tool_call_id": "c", "content": {"x": 1}}, '{"x": 1}'),
        (
            {"role": "tool", "tool_call_id": "c", "content": {"text": "a", "score": 1}},
            '{"text": "a", "score": 1}',
        ),
        ({"role": "tool", "tool_call_id": "c", "content": 5}, "5"),
        ({"role": "tool", "tool_call_id": "c", "content": False}, "false"),
        ({"role": "tool", "tool_call_id": "c", "content": []}, ""),
        ({"role": "tool", "tool_call_id": "c", "content": [1, None]}, "[1, null]"),
        ({"role": "tool", "tool_call_id": "c", "content": [{"type": "error"}]}, '[{"type": "error"}]'),
        ({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}, None]}, "a"),
        ({"role": "function", "name": "f", "content": {"type": ["x"]}}, '{"type": ["x"]}'),
        ({"role": "ipython", "content": {"x": 1}}, '{"x": 1}'),
        ({"role": "user", "content": []}, ""),
        ({"role": "user", "content": ""}, ""),
    ],
)
def test_contents_are_one_text(message: dict[str, Any], text: str) -> None:
    assert turns(message)[0]["content"] == text


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "assistant", "content": "a", "reasoning": "hm"},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, "a"]},
        {
            "role": "assistant",
            "content": [{"type": "redacted_thinking", "data": "x"}, "a"],
            "reasoning": "hm",
        },
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"text": "a"}],
        },
        {"role": "assistant", "content": "a", "reasoning_content": ["h", None, {"text": "m"}]},
        {
            "role": "assistant",
            "content": "a",
            "reasoning": {"summary": [{"type": "summary_text", "text": "hm"}]},
        },
        {"role": "assistant", "content": "a", "reasoning_content": {}, "reasoning": {"content": "hm"}},
    ],
)
def test_reasoning_reaches_templates_under_their_name(message: dict[str, Any]) -> None:
    assert turns(message) == [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]


@pytest.mark.parametrize("nothing", [None, "", [], {}, False, [None], [{}], [[], ""]])
def test_tool_calls_of_nothing_are_absent(nothing: Any) -> None:
    sent = {"role": "assistant", "content": "a", "tool_calls": nothing, "reasoning": nothing, "refusal": {}}
    assert turns(sent) == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "nothing", [None, "", {}, {"name": None, "arguments": None}, {"name": "", "arguments": ""}]
)
def test_older_calls_of_nothing_are_absent(nothing: Any) -> None:
    sent = {"role": "assistant", "content": "a", "function_call": nothing}
    assert turns(sent) == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("call", "name", "arguments"),
    [
        ({"function": None}, "", {}),
        ({"function": {}}, "", {}),
        ({"function": {"name": None, "arguments": "{}"}}, "", {}),
        ({"function": {"name": 5, "arguments": "{}"}}, "5", {}),
        ({"function": {"name": "f" * 1000, "arguments": None}}, "f" * 1000, {}),
        ({"type": "custom", "custom": {"name": "f", "input": "hi"}}, "f", {"input": "hi"}),
        ({"type": "custom", "custom": {"name": "f"}, "function": None}, "f", {"input": None}),
        ({"name": "f", "arguments": '{"x": 1}'}, "f", {"x": 1}),
        ({"type": "tool_call", "name": "f", "args": {"x": 1}}, "f", {"x": 1}),
        ({"type": "tool_use", "name": "f", "input": {"x": 1}}, "f", {"x": 1}),
        ({"function": "f", "arguments": {"x": 1}}, "f", {"x": 1}),
        ({"type": 5, "function": {"name": "f"}}, "f", {}),
    ],
)
def test_calls_of_other_forms_are_function_calls(call: dict[str, Any], name: str, arguments: Any) -> None:
    for calls in ([{"id": "c", **call}], {"id": "c", **call}):
        (turn,) = turns({"role": "assistant", "content": None, "tool_calls": calls})
        function = {"name": name, "arguments": arguments}
        assert turn["tool_calls"] == [{"id": "c", "type": "function", "function": function}]


@pytest.mark.parametrize(
    ("sent", "given"), [(1, "1"), (0, "0"), ("c" * 5000, "c" * 5000), ("", None), (False, None)]
)
def test_ids_of_any_form_are_texts(sent: Any, given: str | None) -> None:
    asked, answered = turns(
        called("{}") | {"tool_calls": [{"id": sent, "function": {"name": "f"}}], "name": sent},
        {"role": "tool", "tool_call_id": sent, "content": "x"},
    )
    assert asked["tool_calls"][0]["id"] == (given or "")
    assert (answered.get("tool_call_id"), asked.get("name")) == (given, given)


@pytest.mark.parametrize(
    "wrong", [{"tool_calls": "f()"}, {"tool_calls": [5]}, {"tool_call_id": ["c"]}, {"name": {"a": 1}}]
)
def test_what_can_mean_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        turns({"role": "assistant", "content": "a", **wrong})


def test_nested_lists_around_a_text_are_read_to_a_depth() -> None:
    deep: Any = "hm"
    for _ in range(150):
        deep = [deep]
    assert turns({"role": "assistant", "content": "a", "reasoning": deep}) == [
        {"role": "assistant", "content": "a"}
    ]


def test_arguments_of_one_conversation_are_read_up_to_a_limit_and_are_text_beyond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "MOST_VALUES", 12)
    text = '{"x": [1, 2, "a, [b]: c"]}'
    assert json_parser.values(text) == 6
    given = [turn["tool_calls"][0]["function"]["arguments"] for turn in turns(*[called(text)] * 3)]
    assert given == [json.loads(text), json.loads(text), {"arguments": text}]


def test_older_function_calls_are_tool_calls() -> None:
    asked, answered = turns(
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "now", "content": "12"},
    )
    (call,) = asked["tool_calls"]
    assert call == {"id": "call_0", "type": "function", "function": {"name": "now", "arguments": {"x": 1}}}
    assert answered == {"role": "tool", "content": "12", "tool_call_id": "call_0", "name": "now"}


def test_developer_is_system_unless_the_template_knows_it() -> None:
    message = {"role": "developer", "content": "be brief"}
    assert turns(message)[0]["role"] == "system"
    known = TemplateFeatures(roles=KNOWN.roles | {"developer"})
    assert turns(message, features=known)[0]["role"] == "developer"


def test_roles_that_the_template_names_are_taken() -> None:
    assert turns({"role": "ipython", "content": "x"})[0]["role"] == "ipython"
    assert turns({"role": "tool", "content": "x"})[0]["role"] == "tool"


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("asistant", "did you mean 'assistant'?"),
        ("User", "did you mean 'user'?"),
        ("human", "did you mean 'user'?"),
        ("model", "did you mean 'assistant'?"),
        ("wizard", "expected one of system, developer, user, assistant, tool"),
        ("", "expected one of"),
    ],
)
def test_other_roles_are_refused_with_the_right_name(role: str, hint: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.role") as caught:
        turns({"role": "user", "content": "x"}, {"role": role, "content": "x"})
    assert hint in str(caught.value)
    assert caught.value.param == "messages[1].role"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "system", "text": "x"}, "messages[0].content"),
        (
            {"role": "tool", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0]",
        ),
        (
            {"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]},
            "messages[0].content[1]",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
    ],
)
def test_content_that_is_not_text_is_refused_by_its_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        turns(message)
    assert caught.value.param == param


async def test_history_reaches_the_template_and_what_was_answered_is_taken_back(
    open_site: Any, tokenizer: Any
) -> None:
    history = [
        {"role": "user", "content": "x"},
        called('{"x": '),
        {"role": "tool", "tool_call_id": "c", "content": None},
        called({"x": 1}, index=0),
        {"role": "tool", "tool_call_id": "c", "content": "12"},
        called("text", id=None, type=None),
    ]
    async with open_site(template=TOOLS_TEMPLATE, context_tokens=4096) as site:
        first = await site.client.post("/v1/chat/completions", json={"messages": history})
        assert first.status_code == 200, first.text
        seen = tokenizer.decode(site.engine.requests[-1].prompt_ids)
        message = first.json()["choices"][0]["message"]
        again = await site.client.post("/v1/chat/completions", json={"messages": [*history, message]})
        assert again.status_code == 200, again.text
    assert "now(x=1)" in seen
    assert "now(arguments=text)" in seen
    assert "[tool|12|" in seen


@pytest.mark.parametrize("newer", [True, False])
async def test_calls_come_in_the_form_of_the_request_and_are_taken_back(
    open_site: Any, tokenizer: Any, newer: bool
) -> None:
    call = '<tool_call>{"name": "now", "arguments": {"x": 1}}</tool_call>'
    asked = (
        {"tools": [{"function": FUNCTION}]} if newer else {"functions": [FUNCTION], "function_call": "auto"}
    )
    async with open_site(
        script=lambda request: tokenizer.encode(call), template=TOOLS_TEMPLATE, context_tokens=4096
    ) as site:
        whole = (await site.complete(**asked, max_tokens=200)).json()["choices"][0]
        streamed = await site.complete(**asked, max_tokens=200, stream=True)
        history = [{"role": "user", "content": "x"}, whole["message"]]
        again = await site.client.post("/v1/chat/completions", json={"messages": history, **asked})
        seen = tokenizer.decode(site.engine.requests[-1].prompt_ids)
    assert again.status_code == 200, again.text
    assert "now(x=1)" in seen
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    reason = events[-1]["choices"][0]["finish_reason"]
    if newer:
        assert whole["message"]["tool_calls"][0]["function"]["name"] == "now"
        assert whole["finish_reason"] == reason == "tool_calls"
    else:
        assert whole["message"]["function_call"] == {"name": "now", "arguments": '{"x": 1}'}
        assert "tool_calls" not in whole["message"]
        called = [delta["function_call"] for delta in deltas if "function_call" in delta]
        assert [each.get("name") for each in called] == ["now"] + [None] * (len(called) - 1)
        assert "".join(each["arguments"] for each in called) == '{"x": 1}'
        assert whole["finish_reason"] == reason == "function_call"
