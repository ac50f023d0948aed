"""Anthropic's routes as plain HTTP; tests/clients has its own client on them."""

import json
from typing import Any

import pytest

from tests.serving.http.test_chat import say
from tests.serving.http.test_tool_fields import CALL, KNOWS_TOOLS

pytestmark = pytest.mark.anyio

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "hi"}]
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
FORMAT = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
TOOL = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
THINKS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


async def post(site: Any, path: str = MESSAGES, **body: Any) -> Any:
    return await site.client.post(path, json={"model": "base", "max_tokens": 200, "messages": HI} | body)


def prompt_of(site: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(site.engine.requests[-1].prompt_ids))


def events_of(reply: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, each of which names its type twice."""
    found = []
    for block in reply.text.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


async def test_a_message_is_answered(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "fine")) as site:
        system = [{"type": "text", "text": "be ", "cache_control": {"type": "ephemeral"}}, {"text": "brief"}]
        reply = await post(site, system=system, metadata={"user_id": "u"})
        assert "system\nbe brief<|im_end|>" in prompt_of(site, tokenizer)
        assert len(site.engine.requests[0].prompt_ids) > 1
    message = reply.json()
    usage = message.pop("usage")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "base",
        "content": [{"type": "text", "text": "fine", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    sent = len(site.engine.requests[0].prompt_ids)
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == sent
    assert usage["output_tokens"] == len(tokenizer.encode("fine"))


async def test_a_stream_has_anthropics_events_in_order(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "fine 🦜 day")) as site:
        events = events_of(await post(site, stream=True))
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == "fine 🦜 day"
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert events[-2]["usage"]["output_tokens"] == len(tokenizer.encode("fine 🦜 day"))


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [({"max_tokens": 2}, "max_tokens", None), ({"stop_sequences": ["XX", "ne d"]}, "stop_sequence", "ne d")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_why_an_answer_ended_is_said(
    open_site: Any, tokenizer: Any, body: Any, reason: str, sequence: str | None, stream: bool
) -> None:
    async with open_site(script=say(tokenizer, "fine day and night")) as site:
        reply = await post(site, stream=stream, **body)
    ended = events_of(reply)[-2]["delta"] if stream else reply.json()
    assert (ended["stop_reason"], ended["stop_sequence"]) == (reason, sequence)


async def test_a_call_is_a_block_and_its_result_goes_back(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, "So: " + CALL)
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        message = (await post(site, tools=[TOOL])).json()
        text, call = message["content"]
        assert (text["text"], call["name"], call["input"]) == ("So:", "weather", {"city": "Köln"})
        assert message["stop_reason"] == "tool_use"
        assert '"weather"' in prompt_of(site, tokenizer)
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"text": "sunny"}]}
        turns = [
            *HI,
            {"role": "assistant", "content": message["content"]},
            {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
        ]
        assert (await post(site, tools=[TOOL], messages=turns)).status_code == 200
        assert "tool\nsunny<|im_end|>\n<|im_start|>user\nand now?" in prompt_of(site, tokenizer)


async def test_a_streamed_call_comes_in_pieces_of_json(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, "So: " + CALL + CALL)
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        events = events_of(await post(site, tools=[TOOL], stream=True))
    started = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert started == ["text", "tool_use", "tool_use"]
    for index in (1, 2):
        pieces = [
            event["delta"]["partial_json"]
            for event in events
            if event["type"] == "content_block_delta" and event["index"] == index
        ]
        assert json.loads("".join(pieces)) == {"city": "Köln"}
    stopped = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert stopped == [0, 1, 2]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "weather"}, {"type": "any"}])
async def test_a_call_may_be_required(open_site: Any, choice: Any) -> None:
    async with open_site(template=KNOWS_TOOLS, context_tokens=2048) as site:
        await post(site, tools=[TOOL], tool_choice=choice)
        assert site.engine.requests[0].sampling.grammar is not None


async def test_a_thought_is_a_block_of_its_own(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, "<think>\nhm\n</think>\n\nyes")
    async with open_site(script=script, template=THINKS, context_tokens=2048) as site:
        whole = (await post(site)).json()
        events = events_of(await post(site, stream=True))
        hidden = (await post(site, thinking={"type": "adaptive", "display": "omitted"})).json()
    assert [block["type"] for block in whole["content"]] == ["thinking", "text"]
    assert whole["content"][0]["thinking"].strip() == "hm"
    started = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert started == ["thinking", "text"]
    assert [block["type"] for block in hidden["content"]] == ["text"]


@pytest.mark.parametrize(("kind", "ends"), [("enabled", "assistant\n"), ("disabled", "</think>\n\n")])
async def test_thinking_is_turned_on_and_off_in_the_template(
    open_site: Any, tokenizer: Any, kind: str, ends: str
) -> None:
    async with open_site(template=THINKS, context_tokens=2048) as site:
        reply = await post(site, thinking={"type": kind, "budget_tokens": 1024})
        assert reply.status_code == 200
        assert prompt_of(site, tokenizer).endswith(ends)


async def test_a_last_turn_of_the_assistant_goes_on(open_site: Any, tokenizer: Any) -> None:
    async with open_site() as site:
        await post(site, messages=[*HI, {"role": "assistant", "content": "The answer is"}])
        assert prompt_of(site, tokenizer).endswith("assistant\nThe answer is")


async def test_tokens_of_a_prompt_are_counted_without_an_answer(open_site: Any) -> None:
    async with open_site() as site:
        await post(site, system="be brief")
        counted = await post(site, COUNT, system="be brief")
        assert counted.json() == {"input_tokens": len(site.engine.requests[0].prompt_ids)}
        assert len(site.engine.requests) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"stop": "a", "stop_sequences": ["b"]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"output_config": FORMAT, "output_format": FORMAT["format"]}, "output_format"),
        ({"output_config": FORMAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({"output_config": FORMAT, "guided_regex": "a"}, "guided_regex"),
        (
            {"messages": [*HI, {"role": "assistant", "content": [USE] * 1025}]},
            "messages[1]",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
            "output_config.format",
        ),
    ],
)
async def test_what_is_not_served_names_its_field_in_anthropics_form(
    open_site: Any, body: Any, param: str
) -> None:
    async with open_site(template=KNOWS_TOOLS) as site:
        reply = await post(site, **body)
    assert reply.status_code == 400
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["param"] == param


async def test_errors_have_anthropics_types(open_site: Any) -> None:
    async with open_site(api_key="secret") as site:
        key = {"x-api-key": "secret"}
        wrong = await site.client.post(MESSAGES, json={}, headers={"x-api-key": "no"})
        missing = await site.client.post(MESSAGES, json={"model": "none", "messages": HI}, headers=key)
        site.engine.failure, site.engine.fail_after = RuntimeError("boom"), 1
        body = {"messages": HI, "stream": True}
        broken = await site.client.post(MESSAGES, json=body, headers=key)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    last = events_of(broken)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "boom" not in broken.text


async def test_a_format_is_a_constraint(open_site: Any) -> None:
    async with open_site(context_tokens=2048) as site:
        await post(site, output_config=FORMAT)
        assert site.engine.requests[0].sampling.grammar is not None


async def test_blocks_are_the_same_streamed_and_whole(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, f"<think>\nhm\n</think>\n\nSo: {CALL} then {CALL} done")
    tools: Any = {"tools": [TOOL]}
    async with open_site(script=script, template=KNOWS_TOOLS + THINKS, context_tokens=2048) as site:
        whole = (await post(site, **tools)).json()["content"]
        events = events_of(await post(site, stream=True, **tools))
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    texts = [""] * len(blocks)
    for event in events:
        if event["type"] == "content_block_delta":
            texts[event["index"]] += next(text for key, text in event["delta"].items() if key != "type")
    said = [block.get("thinking") or block.get("text") or json.dumps(block.get("input")) for block in whole]
    assert [block["type"] for block in whole] == [block["type"] for block in blocks]
    assert [json.loads(text) if text[0] == "{" else text for text in texts] == [
        json.loads(text) if text[0] == "{" else text for text in said
    ]
    assert [block["type"] for block in whole].count("text") == 3


async def test_half_a_character_in_arguments_is_no_failure(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, CALL.replace("Köln", r"\ud83d"))
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        reply = await post(site, tools=[TOOL])
    assert reply.json()["content"][0]["input"] == {"city": "\ufffd"}
