"""POST /v1/responses, through the official client."""

import json
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from runtime.serving.http.responses_body import ResponsesBody
from tests.costs import assert_linear
from tests.serving.http.test_anthropic import THINKS
from tests.serving.http.test_chat import say
from tests.serving.http.test_openai import client_of
from tests.serving.http.test_tool_fields import CALL, KNOWS_TOOLS

pytestmark = pytest.mark.anyio


async def test_input_text_is_answered(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "fine")) as site:
        answer = await client_of(site).responses.create(model="base", input="hi", instructions="be brief")
        seen = tokenizer.decode(site.engine.requests[0].prompt_ids)
    assert answer.output_text == "fine"
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(tokenizer.encode("fine"))
    assert "system\nbe brief" in seen


async def test_input_items_are_a_conversation(open_site: Any, tokenizer: Any) -> None:
    turns: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes?"}]},
        {"role": "user", "content": "well"},
    ]
    async with open_site() as site:
        await client_of(site).responses.create(model="base", input=turns)
        seen = tokenizer.decode(site.engine.requests[0].prompt_ids)
    assert [part in seen for part in ("system\nbe brief", "user\nhi", "assistant\nyes?", "user\nwell")] == [
        True
    ] * 4


async def test_stream_has_openais_events_in_order(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "a 🦜 word")) as site:
        stream = await client_of(site).responses.create(model="base", input="hi", stream=True)
        events: list[Any] = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "a 🦜 word"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "a 🦜 word"


async def test_cut_answer_is_incomplete(open_site: Any) -> None:
    async with open_site() as site:
        answer = await client_of(site).responses.create(model="base", input="hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


async def test_failure_in_a_stream_is_an_error_event(open_site: Any) -> None:
    async with open_site() as site:
        site.engine.failure, site.engine.fail_after = RuntimeError("boom"), 2
        reply = await site.client.post("/v1/responses", json={"input": "hi", "stream": True})
    assert reply.text.rstrip().split("\n\n")[-2].startswith("event: error\n")
    assert "boom" not in reply.text


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"input": [{"type": "item_reference", "role": "x"}]}, "input[0]"),
    ],
)
async def test_what_is_not_supported_names_its_field(open_site: Any, extra: Any, param: str) -> None:
    async with open_site() as site:
        with pytest.raises(openai.BadRequestError) as caught:
            await client_of(site).responses.create(**({"model": "base", "input": "hi"} | extra))
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_are_included_where_they_are_wanted(
    open_site: Any, tokenizer: Any, stream: bool
) -> None:
    wanted: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": stream}
    async with open_site(script=say(tokenizer, "a<|im_start|> 🦜")) as site:
        answer: Any = await client_of(site).responses.create(model="base", input="hi", **wanted)
        events = [event async for event in answer] if stream else []
    deltas = [entry for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    response = events[-1].response if stream else answer
    logged = response.output[0].content[0].logprobs
    assert bytes(byte for entry in logged for byte in entry.bytes).decode() == "a 🦜"
    assert {len(entry.top_logprobs) for entry in logged} == {2}
    assert [entry.token for entry in deltas] == ([entry.token for entry in logged] if stream else [])


async def test_no_log_probabilities_without_include(open_site: Any) -> None:
    async with open_site() as site:
        answer: Any = await client_of(site).responses.create(model="base", input="hi", include=[])
        with pytest.raises(openai.BadRequestError) as caught:
            await client_of(site).responses.create(model="base", input="hi", top_logprobs=2)
    assert answer.output[0].content[0].logprobs == []
    assert caught.value.param == "top_logprobs"


TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_items_and_their_outputs_go_back(
    open_site: Any, tokenizer: Any, stream: bool
) -> None:
    script = say(tokenizer, "So: " + CALL + CALL)
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        client = client_of(site)
        items: Any = [{"role": "user", "content": "weather?"}]
        asked: Any = {"model": "base", "tools": [TOOL], "max_output_tokens": 200}
        if stream:
            async with client.responses.stream(input=items, **asked) as events:
                kinds = [event.type async for event in events]
                answer = await events.get_final_response()
            assert kinds.count("response.function_call_arguments.done") == 2
        else:
            answer = await client.responses.create(input=items, **asked)
        calls: Any = answer.output[1:]
        assert answer.output_text == "So:"
        assert [(call.type, call.name, json.loads(call.arguments)) for call in calls] == [
            ("function_call", "weather", {"city": "Köln"})
        ] * 2
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        items += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in calls
        ]
        await client.responses.create(input=items, **asked)
        seen = tokenizer.decode(site.engine.requests[-1].prompt_ids)
    assert seen.endswith(
        "assistant\nSo:<|im_end|>\n" + "<|im_start|>tool\nsun<|im_end|>\n" * 2 + "<|im_start|>assistant\n"
    )


ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}, ALLOWED])
async def test_a_call_may_be_required(open_site: Any, choice: Any) -> None:
    async with open_site(template=KNOWS_TOOLS, context_tokens=2048) as site:
        answer = await client_of(site).responses.create(
            model="base", input="hi", tools=[TOOL], tool_choice=choice
        )
        assert site.engine.requests[0].sampling.grammar is not None
    assert answer.tools[0].name == "weather"  # type: ignore[union-attr]


async def test_a_thought_is_an_item_and_is_shown_to_the_model_again(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, "<think>\nhm\n</think>\n\nyes")
    async with open_site(script=script, template=THINKS, context_tokens=2048) as site:
        client = client_of(site)
        items: Any = [{"role": "user", "content": "is it?"}]
        asked: Any = {"model": "base", "input": items, "max_output_tokens": 200}
        answer = await client.responses.create(**asked)
        stream = await client.responses.create(**asked, stream=True)
        cut = await client.responses.create(**asked | {"max_output_tokens": 10})
        events: list[Any] = [event async for event in stream]
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        await client.responses.create(model="base", input=[*items, {"role": "user", "content": "sure?"}])
        seen = tokenizer.decode(site.engine.requests[-1].prompt_ids)
    assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]  # type: ignore[union-attr]
    thought, message = answer.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text.strip() == "hm"
    assert answer.output_text == "yes"
    assert message.status == "completed"
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == thought.content[0].text
    added = [event.output_index for event in events if event.type == "response.output_item.added"]
    done = [event.output_index for event in events if event.type == "response.output_item.done"]
    assert added == done == [0, 1]
    assert "<think>\nhm" in seen
    assert seen.count("assistant\n") == 2


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id"),
        (
            [{"role": "user", "content": "x"}, {"type": "function_call_output", "call_id": "c"}],
            "input[1].output",
        ),
        (
            [
                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
                {"role": "robot", "content": "x"},
            ],
            "input[2].role",
        ),
    ],
)
async def test_an_item_at_fault_is_named_by_its_own_place(open_site: Any, items: Any, param: str) -> None:
    async with open_site() as site:
        reply = await site.client.post("/v1/responses", json={"input": items})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_each_event_is_one_of_the_clients_own_types(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, "<think>\nhm\n</think>\n\nSo: " + CALL)
    ours: Any = {"input": "hi", "tools": [TOOL], "max_output_tokens": 200, "stream": True}
    async with open_site(script=script, template=KNOWS_TOOLS + THINKS, context_tokens=2048) as site:
        reply = await site.client.post("/v1/responses", json=ours)
    events: Any = TypeAdapter(ResponseStreamEvent)
    kinds = set()
    for block in reply.text.strip().split("\n\n"):
        kinds.add(events.validate_json(block.partition("data: ")[2]).type)
    assert {"response.reasoning_text.delta", "response.output_text.done", "response.completed"} <= kinds


async def test_the_output_of_a_call_may_be_a_list_of_parts(open_site: Any, tokenizer: Any) -> None:
    output: Any = [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "ny"}]
    items: Any = [
        {"role": "user", "content": "weather?"},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": output},
    ]
    async with open_site() as site:
        reply = await site.client.post("/v1/responses", json={"input": items})
        assert reply.status_code == 200
        assert "tool\nsunny<|im_end|>" in tokenizer.decode(site.engine.requests[0].prompt_ids)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
async def test_two_forms_of_one_answer_exclude_each_other(open_site: Any, more: Any, param: str) -> None:
    async with open_site() as site:
        body = {"input": "hi", "text": {"format": {"type": "json_object"}}} | more
        reply = await site.client.post("/v1/responses", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_thought_that_a_message_carries_itself_is_shown_too(open_site: Any, tokenizer: Any) -> None:
    said: Any = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    async with open_site(template=THINKS, context_tokens=2048) as site:
        items = [{"role": "user", "content": "is it?"}, said, {"role": "user", "content": "sure?"}]
        await site.client.post("/v1/responses", json={"input": items})
        assert "<think>\nhm" in tokenizer.decode(site.engine.requests[0].prompt_ids)


async def test_a_part_that_is_no_text_is_refused_within_an_answer_too(open_site: Any) -> None:
    thought = {"type": "reasoning", "content": [{"type": "input_image", "image_url": "x"}]}
    async with open_site() as site:
        reply = await site.client.post("/v1/responses", json={"input": [thought]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input[0].content[0]")


def test_thoughts_in_a_row_are_joined_at_a_cost_in_proportion() -> None:
    def joined(items: int) -> None:
        thought = {"type": "reasoning", "summary": "x" * 500}
        body = ResponsesBody.model_validate({"input": [thought] * items})
        assert len(body.as_chat()[0].messages[0].reasoning_content or "") == 500 * items

    assert_linear(joined, 1_000, 8_000)


async def test_a_turn_of_more_calls_than_are_taken_is_refused(open_site: Any, tokenizer: Any) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    async with open_site() as site:
        with pytest.raises(openai.BadRequestError, match=r"'input\[0\]' .* 1025 calls, at most 1024"):
            await client_of(site).responses.create(model="base", input=[call] * 1025)  # type: ignore[list-item]
