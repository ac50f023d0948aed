"""The fields of tools through the official client: calls come back, streamed and not, and go in again."""

import json
from typing import Any

import openai
import pytest

from tests.serving.conftest import TEMPLATE
from tests.serving.http.test_chat import say
from tests.serving.http.test_openai import HI, client_of

pytestmark = pytest.mark.anyio

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
KNOWS_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + TEMPLATE


async def test_official_client_gets_calls(open_site: Any, tokenizer: Any) -> None:
    """Fault 52, tools."""
    script = say(tokenizer, CALL)
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        answer = await client_of(site).chat.completions.create(
            model="base", messages=HI, tools=[TOOL], max_tokens=200
        )
        assert '"weather"' in tokenizer.decode(site.engine.requests[0].prompt_ids)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})


async def test_official_client_gets_streamed_calls(open_site: Any, tokenizer: Any) -> None:
    script = say(tokenizer, "So: " + CALL)
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        stream = await client_of(site).chat.completions.create(
            model="base", messages=HI, tools=[TOOL], max_tokens=200, stream=True
        )
        chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "So:"
    calls: Any = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(call.index, bool(call.id), call.function.name) for call in calls] == [
        (0, True, "weather"),
        (0, False, None),
    ]
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Köln"}
    assert chunks[-1].finish_reason == "tool_calls"


async def test_tool_result_goes_back_through_the_template(open_site: Any, tokenizer: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    async with open_site(template=KNOWS_TOOLS) as site:
        reply = await site.complete(messages=turns, tools=[TOOL])
        assert reply.status_code == 200
        assert "tool\nsunny" in tokenizer.decode(site.engine.requests[0].prompt_ids)
        call["function"]["arguments"] = "{broken"  # type: ignore[index]
        assert (await site.complete(messages=turns)).status_code == 200


CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def allowing(mode: str, *names: str) -> Any:
    """Return OpenAI's `tool_choice` of some tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("said", [CALL, CALL.replace("weather", "nobody")])
async def test_only_allowed_tools_are_called_and_all_are_shown(
    open_site: Any, tokenizer: Any, said: str
) -> None:
    script = say(tokenizer, f"{said}\n{CLOCK_CALL}")
    async with open_site(script=script, template=KNOWS_TOOLS, context_tokens=2048) as site:
        answer = await client_of(site).chat.completions.create(
            model="base",
            messages=HI,
            tools=[TOOL, CLOCK],
            max_tokens=300,
            tool_choice=allowing("auto", "clock"),
        )
        (request,) = site.engine.requests
        assert '"weather"' in tokenizer.decode(request.prompt_ids)
        assert request.sampling.grammar is None
    message = answer.choices[0].message
    calls: Any = message.tool_calls
    assert [call.function.name for call in calls] == ["clock"]
    assert message.content == said


async def test_one_of_the_allowed_tools_may_be_required(open_site: Any) -> None:
    async with open_site(template=KNOWS_TOOLS, context_tokens=2048) as site:
        await client_of(site).chat.completions.create(
            model="base", messages=HI, tools=[TOOL, CLOCK], tool_choice=allowing("required", "clock")
        )
        grammar = site.engine.requests[0].sampling.grammar
    assert "clock" in grammar.constraint.value["top"]
    assert "weather" not in grammar.constraint.value["top"]


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_allowed_tools_are_among_the_tools(open_site: Any, mode: str) -> None:
    async with open_site(template=KNOWS_TOOLS) as site:
        with pytest.raises(openai.BadRequestError, match="names 'nobody'") as caught:
            await client_of(site).chat.completions.create(
                model="base", messages=HI, tools=[TOOL], tool_choice=allowing(mode, "weather", "nobody")
            )
    assert caught.value.param == "tool_choice"


async def test_call_to_no_tool_is_refused(open_site: Any) -> None:
    async with open_site(template=KNOWS_TOOLS) as site:
        choice = {"type": "function", "function": {"name": "nobody"}}
        reply = await site.complete(tools=[TOOL], tool_choice=choice)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")
        assert (await site.complete(tools=[TOOL], tool_choice="none")).status_code == 200


async def test_template_without_tools_refuses_them(open_site: Any) -> None:
    async with open_site() as site:
        with pytest.raises(openai.BadRequestError) as caught:
            await client_of(site).chat.completions.create(model="base", messages=HI, tools=[TOOL])
    assert caught.value.param == "tools"
