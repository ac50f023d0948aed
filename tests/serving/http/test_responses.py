"""POST /v1/responses, through the official client."""

from typing import Any

import openai
import pytest

from tests.serving.http.test_chat import say
from tests.serving.http.test_openai import client_of

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
        ({"tools": [{"type": "web_search"}]}, "tools"),
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
