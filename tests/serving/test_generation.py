"""Answers in every family's spelling, as agents meet them: tool loops and thoughts through openai-python.

The engine says what it is told, in tokens of a tokenizer that has the family's special ones.
"""

import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.serving.answer_parsers.spelled import SPELLINGS, TOOLS, Spelling
from tests.serving.conftest import TEMPLATE
from tests.serving.http.test_openai import client_of

pytestmark = pytest.mark.anyio

DECLARED: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()
]
ASKED: Any = {"role": "user", "content": "weather?"}
CHATML = "<|im_start|>assistant\n"


@dataclass
class Said:
    """One answer as a client reads it, whole or put together from its stream."""

    finish: str = ""
    content: str = ""
    reasoning: str = ""
    calls: list[Any] = field(default_factory=list)
    reasoning_tokens: int = 0

    def message(self) -> Any:
        """Return what an agent sends back."""
        calls = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in self.calls
        ]
        more = {"tool_calls": calls} if calls else {}
        thought = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": "assistant", "content": self.content or None, **more, **thought}

    def called(self) -> list[Any]:
        return [(name, json.loads(arguments)) for _, name, arguments in self.calls]


async def whole(client: Any, **body: Any) -> Said:
    answer = await client.chat.completions.create(model="base", max_tokens=900, **body)
    (choice,) = answer.choices
    message = choice.message
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
    reasoning = getattr(message, "reasoning_content", None) or ""
    assert reasoning == (getattr(message, "reasoning", None) or "")
    tokens = answer.usage.completion_tokens_details.reasoning_tokens
    return Said(choice.finish_reason, message.content or "", reasoning, calls, tokens)


async def streamed(client: Any, **body: Any) -> Said:
    said = Said()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.chat.completions.create(model="base", max_tokens=900, **options, **body):
        if chunk.usage:
            said.reasoning_tokens = chunk.usage.completion_tokens_details.reasoning_tokens
        for choice in chunk.choices:
            delta = choice.delta
            said.content += delta.content or ""
            said.reasoning += getattr(delta, "reasoning_content", None) or ""
            said.finish = choice.finish_reason or said.finish
            for call in delta.tool_calls or []:
                if call.id:
                    assert call.index == len(said.calls)
                    said.calls.append((call.id, call.function.name, ""))
                known = said.calls[call.index]
                said.calls[call.index] = (*known[:2], known[2] + (call.function.arguments or ""))
    return said


@asynccontextmanager
async def telling(
    open_site: Any, tokenizer: Any, spelling: Spelling, answers: list[str]
) -> AsyncIterator[Any]:
    """Open a site that gives these answers one after another, in the family's format."""
    used = copy.deepcopy(tokenizer)
    used.add_special_tokens({"additional_special_tokens": list(spelling.specials)})
    left = iter(answers)
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE.replace(
        CHATML, CHATML + spelling.prompt
    )
    async with open_site(
        tokenizer=used,
        template=template,
        script=lambda request: used.encode(next(left)),
        context_tokens=8192,
    ) as site:
        names = {"tool_call_parser": spelling.calls, "reasoning_parser": spelling.reasoning}
        site.lifecycle.ready(replace(site.lifecycle.served(), **names))
        yield site


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("name", sorted(SPELLINGS))
async def test_a_tool_loop_of_three_turns(open_site: Any, tokenizer: Any, name: str, ask: Any) -> None:
    spelling = SPELLINGS[name]
    plain = "short</think>It rains." if spelling.prompt else "It rains."
    async with telling(open_site, tokenizer, spelling, [spelling.text, plain, spelling.text]) as site:
        client, history = client_of(site), [ASKED]
        first = await ask(client, messages=history, tools=DECLARED)
        assert (first.finish, first.content, first.reasoning) == (
            "tool_calls", spelling.content, spelling.thought,
        )  # fmt: skip
        assert first.called() == list(spelling.called)
        assert bool(first.reasoning_tokens) == bool(spelling.thought)
        results = [{"role": "tool", "tool_call_id": call[0], "content": "rain"} for call in first.calls]
        history += [first.message(), *results]
        second = await ask(client, messages=history, tools=DECLARED)
        assert (second.finish, second.content, second.calls) == ("stop", "It rains.", [])
        history += [second.message(), ASKED]
        third = await ask(client, messages=history, tools=DECLARED)
        assert third.called() == first.called()
        assert {call[0] for call in third.calls}.isdisjoint(call[0] for call in first.calls)


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("name", sorted(name for name, each in SPELLINGS.items() if each.reasoning))
async def test_two_turns_of_a_model_that_thinks(open_site: Any, tokenizer: Any, name: str, ask: Any) -> None:
    spelling = SPELLINGS[name]
    async with telling(open_site, tokenizer, spelling, [spelling.text] * 3) as site:
        client, history = client_of(site), [ASKED]
        first = await ask(client, messages=history)
        assert first.reasoning == spelling.thought
        assert first.content.startswith(spelling.content)
        assert (first.finish, first.calls) == ("stop", [])
        second = await ask(client, messages=[*history, first.message(), ASKED])
        assert (second.reasoning, second.content) == (first.reasoning, first.content)
        hidden = await ask(client, messages=history, extra_body={"include_reasoning": False})
        assert (hidden.reasoning, hidden.content) == ("", first.content)
        assert hidden.reasoning_tokens == first.reasoning_tokens > 0


async def test_reasoning_tokens_are_those_of_the_thought(open_site: Any, tokenizer: Any) -> None:
    spelling = SPELLINGS["gpt-oss"]
    async with telling(open_site, tokenizer, spelling, [spelling.text]) as site:
        said = await whole(client_of(site), messages=[ASKED], tools=DECLARED)
    assert said.reasoning_tokens == len(tokenizer.encode(spelling.thought))


async def test_stop_strings_end_content_and_no_thought(open_site: Any, tokenizer: Any) -> None:
    spelling = SPELLINGS["qwen3"]
    async with telling(open_site, tokenizer, spelling, ["<think>a STOP b</think>one STOP two"]) as site:
        said = await streamed(client_of(site), messages=[ASKED], stop=["STOP"])
    assert (said.reasoning, said.content, said.finish) == ("a STOP b", "one ", "stop")


async def test_an_answer_that_is_cut_says_so(open_site: Any, tokenizer: Any) -> None:
    spelling = SPELLINGS["hermes"]
    async with telling(open_site, tokenizer, spelling, [spelling.text] * 2) as site:
        site.engine.context_tokens = 8192
        answer = await client_of(site).chat.completions.create(
            model="base", messages=[ASKED], tools=DECLARED, max_tokens=40
        )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content


async def test_each_of_several_answers_is_read_by_itself(open_site: Any, tokenizer: Any) -> None:
    spelling = SPELLINGS["qwen3"]
    answers = [spelling.text, "<think>b</think>two"]
    async with telling(open_site, tokenizer, spelling, answers) as site:
        answer = await client_of(site).chat.completions.create(
            model="base", messages=[ASKED], tools=DECLARED, max_tokens=900, n=2
        )
    assert sorted(choice.finish_reason for choice in answer.choices) == ["stop", "tool_calls"]
    assert {choice.message.content for choice in answer.choices} == {"two", spelling.content}


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_are_of_all_tokens(open_site: Any, tokenizer: Any, stream: bool) -> None:
    spelling = SPELLINGS["qwen3"]
    async with telling(open_site, tokenizer, spelling, [spelling.text]) as site:
        body = {"model": "base", "messages": [ASKED], "tools": DECLARED, "max_tokens": 900, "logprobs": True}
        answer: Any = await client_of(site).chat.completions.create(**body, stream=stream)
        choices = (
            [c for chunk in [x async for x in answer] for c in chunk.choices] if stream else answer.choices
        )
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(entries) == len(tokenizer.encode(spelling.text))


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_has_the_thought_in_a_field_of_its_own(
    open_site: Any, tokenizer: Any, stream: bool
) -> None:
    spelling = SPELLINGS["qwen3"]
    async with telling(open_site, tokenizer, spelling, ["<think>hm</think>\n\nHello"]) as site:
        reply = await site.client.post("/chat", json={"prompt": "x", "max_tokens": 90, "stream": stream})
    if not stream:
        assert (reply.json()["Result"], reply.json()["reasoning"]) == ("Hello", "hm")
        return
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == "Hello"
    assert "".join(event.get("reasoning", "") for event in events) == "hm"
