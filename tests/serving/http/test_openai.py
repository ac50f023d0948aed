"""The OpenAI routes, through the official client where it can tell, else as plain HTTP."""

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.serving.http.test_chat import say

pytestmark = pytest.mark.anyio


def client_of(site: Any, **options: Any) -> openai.AsyncOpenAI:
    """Return the official client, talking to an app in this process."""
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=site.client, max_retries=0, **options
    )


HI: Any = [{"role": "user", "content": "hi"}]


async def test_chat_completion(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "fine")) as site:
        answer = await client_of(site).chat.completions.create(model="base", messages=HI)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "fine",
        "stop",
    )
    assert answer.model == "base"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokenizer.encode("fine"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_streamed_chat_completion(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "fine 🦜 day")) as site:
        stream = await client_of(site).chat.completions.create(
            model="base", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "fine 🦜 day"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode("fine 🦜 day"))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stream_without_usage_has_no_usage_key(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.complete(stream=True)
    assert "usage" not in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")
    assert reply.headers["x-accel-buffering"] == "no"


async def test_length_is_the_reason_when_the_limit_ends_it(open_site: Any) -> None:
    async with open_site() as site:
        answer = await client_of(site).chat.completions.create(
            model="base", messages=HI, max_completion_tokens=3, max_tokens=9
        )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_n_choices_have_seeds_of_their_own(open_site: Any) -> None:
    async with open_site() as site:
        answer = await client_of(site).chat.completions.create(model="base", messages=HI, n=3, seed=5)
        assert [request.sampling.seed for request in site.engine.requests] == [5, 6, 7]
        assert [request.sampling.temperature for request in site.engine.requests] == [1.0] * 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


async def test_n_choices_stream_side_by_side(open_site: Any) -> None:
    async with open_site() as site:
        stream = await client_of(site).chat.completions.create(
            model="base", messages=HI, n=2, stream=True, max_tokens=4
        )
        chunks = [chunk async for chunk in stream]
    ends = [(c.choices[0].index, c.choices[0].finish_reason) for c in chunks if c.choices[0].finish_reason]
    assert sorted(ends) == [(0, "length"), (1, "length")]


async def test_n_is_all_or_nothing(open_site: Any) -> None:
    async with open_site(rows=1, queue=1, pace_s=0.01) as site:
        reply = await site.complete(n=4)
        assert reply.status_code == 429
        await asyncio.sleep(0.01)
        assert (site.engine.stats().running, site.engine.stats().waiting) == (0, 0)
        assert (await site.complete()).status_code == 200


async def test_logprobs_of_chat(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "a🦜")) as site:
        answer = await client_of(site).chat.completions.create(
            model="base", messages=HI, logprobs=True, top_logprobs=2
        )
    scored = answer.choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    assert len(scored.content) == len(tokenizer.encode("a🦜"))
    first = scored.content[0]
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert len(first.top_logprobs) == 2
    assert bytes(byte for entry in scored.content for byte in entry.bytes or []).decode() == "a🦜"
    assert scored.content[1].token == r"\xf0", "a part of a character is no text"


async def test_streamed_logprobs_miss_no_token(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "a🦜b")) as site:
        stream = await client_of(site).chat.completions.create(
            model="base", messages=HI, logprobs=True, stream=True
        )
        scored = [c.choices[0].logprobs async for c in stream if c.choices[0].logprobs]
    tokens = [entry.token for logprobs in scored for entry in logprobs.content or []]
    assert len(tokens) == len(tokenizer.encode("a🦜b"))


async def test_completion_of_text_ids_and_several_prompts(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, " word")) as site:
        client = client_of(site)
        text = await client.completions.create(model="base", prompt="the", echo=True)
        ids = await client.completions.create(model="base", prompt=tokenizer.encode("the"))
        several = await client.completions.create(model="base", prompt=["a", "b"])
        id_lists = await client.completions.create(model="base", prompt=[[5, 6], [7]])
        assert tokenizer.decode(site.engine.requests[0].prompt_ids) == "the"
    assert text.choices[0].text == "the word"
    assert ids.choices[0].text == " word"
    assert [choice.text for choice in several.choices] == [" word", " word"]
    assert len(id_lists.choices) == 2
    assert several.id.startswith("cmpl-")


async def test_streamed_completion_with_logprobs(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "a word")) as site:
        stream = await client_of(site).completions.create(model="base", prompt="x", stream=True, logprobs=1)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a word"
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens or []]
    assert "".join(tokens) == "a word"


async def test_models_list_base_and_adapters(open_site: Any) -> None:
    async with open_site(adapters=["shop"]) as site:
        models = await client_of(site).models.list()
        one = await client_of(site).models.retrieve("shop")
        with pytest.raises(openai.NotFoundError):
            await client_of(site).models.retrieve("nobody")
    assert [model.id for model in models.data] == ["base", "shop"]
    assert one.id == "shop"


async def test_unknown_model_is_404(open_site: Any) -> None:
    async with open_site() as site:
        with pytest.raises(openai.NotFoundError) as caught:
            await client_of(site).chat.completions.create(model="gpt-9", messages=HI)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_prompt_and_answer_over_the_context_is_400(open_site: Any) -> None:
    async with open_site(context_tokens=64) as site:
        with pytest.raises(openai.BadRequestError) as caught:
            await client_of(site).chat.completions.create(model="base", messages=HI, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
    said = r"maximum context length is 64 tokens. However, you requested (\d+) tokens \((\d+) in the messages"
    found = re.search(said, caught.value.message)
    assert found is not None
    assert int(found[1]) == int(found[2]) + 1000


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"functions": [{"name": "f"}]}, "tools"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": []}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"function_call": {"name": "g"}, "functions": [{"name": "f"}]}, "function_call"),
        (
            {"tool_choice": "required", "tools": [{"function": {"name": "f"}}], "guided_regex": "a"},
            "guided_regex",
        ),
        ({"functions": [{"name": "f"}], "tools": [{"function": {"name": "f"}}]}, ""),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": -1}, "temperature"),
        ({"n": 99}, "n"),
        ({"n": "many"}, "n"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"stop": ["x"] * 99}, "stop"),
    ],
)
async def test_what_is_wrong_or_not_supported_names_its_field(open_site: Any, extra: Any, param: str) -> None:
    async with open_site() as site:
        reply = await site.complete(**extra)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert set(reply.json()) == {"error"}


async def test_unknown_and_unused_fields_are_ignored(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.complete(
            user="u", store=False, metadata={}, parallel_tool_calls=True, service_tier="auto", brand_new=1
        )
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": "x"}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 40 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"\\ud800": 1}}',
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"a": 1}}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"messages": [{"role": "\\u0000", "content": "\\u0000"}]}',
    ],
)
async def test_malformed_bodies_are_4xx_in_openais_shape(open_site: Any, content: bytes) -> None:
    """Fault 43."""
    async with open_site() as site:
        reply = await site.client.post("/v1/chat/completions", content=content)
    assert 400 <= reply.status_code < 500
    assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_nul_in_the_text_is_text(open_site: Any) -> None:
    async with open_site() as site:
        assert (await site.complete("a\x00b")).status_code == 200


async def test_error_event_in_the_middle_of_a_stream_raises_in_the_client(open_site: Any) -> None:
    async with open_site() as site:
        site.engine.failure, site.engine.fail_after = RuntimeError("boom"), 3
        stream = await client_of(site).chat.completions.create(model="base", messages=HI, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass


async def test_unknown_routes_and_methods_answer_in_the_same_shape(open_site: Any) -> None:
    async with open_site() as site:
        missing = await site.client.post("/v1/nothing", json={})
        method = await site.client.get("/v1/chat/completions")
    assert (missing.status_code, method.status_code) == (404, 405)
    assert json.loads(missing.text)["error"]["message"].startswith("there is no /v1/nothing")
    assert method.headers["allow"] == "POST, OPTIONS"


WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TOOLS_TEMPLATE = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("started_with", "body", "param"),
    [
        ({"tool_call_parser": "somebodys"}, {"tools": WEATHER}, "tools"),
        ({"reasoning_parser": "somebodys"}, {"include_reasoning": False}, "include_reasoning"),
        ({"reasoning_parser": "qwen3"}, {"include_reasoning": False}, None),
        ({"tool_call_parser": "hermes"}, {"tools": WEATHER}, None),
        ({"tool_call_parser": "somebodys"}, {"tools": WEATHER, "tool_choice": "none"}, None),
        ({"reasoning_parser": "somebodys"}, {}, None),
    ],
)
async def test_requests_that_need_a_parser_which_is_not_known_are_refused(
    open_site: Any, started_with: dict[str, str], body: dict[str, Any], param: str | None
) -> None:
    async with open_site(template=TOOLS_TEMPLATE) as site:
        site.lifecycle.ready(replace(site.lifecycle.served(), **started_with))
        reply = await site.complete(**body)
    assert reply.status_code == (400 if param else 200), reply.text
    if param:
        assert reply.json()["error"]["param"] == param
        assert next(iter(started_with.values())) in reply.json()["error"]["message"]


async def test_the_base_model_answers_to_every_name_it_is_served_under(open_site: Any) -> None:
    async with open_site(adapters=["shop"]) as site:
        site.lifecycle.ready(replace(site.lifecycle.served(), aliases=("other",)))
        listed = [(m.id, m.root, m.parent) async for m in client_of(site).models.list()]  # type: ignore[attr-defined]
        answer = await client_of(site).chat.completions.create(model="other", messages=HI)
    assert listed == [("base", "base", None), ("other", "base", None), ("shop", "shop", "base")]
    assert answer.model == "base"


async def test_offsets_count_over_the_whole_answer_in_a_stream_too(open_site: Any, tokenizer: Any) -> None:
    said = "a 🦜 word"
    async with open_site(script=say(tokenizer, said)) as site:
        client = client_of(site)
        stream = await client.completions.create(model="base", prompt="x", stream=True, logprobs=2)
        chunks = [chunk.choices[0].logprobs async for chunk in stream]
        whole = (await client.completions.create(model="base", prompt="x", logprobs=2)).choices[0].logprobs
    streamed = [chunk for chunk in chunks if chunk]
    assert whole is not None
    offsets = whole.text_offset or []
    assert [offset for chunk in streamed for offset in chunk.text_offset or []] == offsets
    assert [token for chunk in streamed for token in chunk.tokens or []] == whole.tokens
    assert len(offsets) == len(tokenizer.encode(said))
    for offset, token in zip(offsets, whole.tokens or [], strict=True):
        assert said[offset:].startswith(token) or said[offset] == "🦜"
    assert [t for t in whole.tokens or [] if t.startswith("bytes:")] == [
        r"bytes:\xf0", r"bytes:\x9f", r"bytes:\xa6", r"bytes:\x9c"
    ]  # fmt: skip
    assert all(token in top for token, top in zip(whole.tokens or [], whole.top_logprobs or [], strict=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_a_stop_string_have_no_log_probabilities(
    open_site: Any, tokenizer: Any, stream: bool
) -> None:
    async with open_site(script=say(tokenizer, "ab STOP and more")) as site:
        reply = await site.complete(stop=["STOP"], logprobs=True, stream=stream, max_tokens=60)
    if stream:
        events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        logged = [event["choices"][0]["logprobs"] for event in events]
    else:
        logged = [reply.json()["choices"][0]["logprobs"]]
    entries = [entry for part in logged if part for entry in part["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "ab "


async def test_stop_strings_wait_for_min_tokens(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "aXbXcX")) as site:
        texts = [
            (await site.complete(stop="X", min_tokens=least, max_tokens=6)).json()["choices"][0]
            for least in (0, 1, 2, 4, 6)
        ]
    assert [choice["message"]["content"] for choice in texts] == ["a", "a", "aXb", "aXbXc", "aXbXcX"]
    assert [choice["finish_reason"] for choice in texts] == ["stop"] * 4 + ["length"]


async def test_special_tokens_and_stop_strings_are_shown_where_they_are_wanted(
    open_site: Any, tokenizer: Any
) -> None:
    async with open_site(script=say(tokenizer, "ab<|im_start|>user")) as site:

        async def content(**fields: Any) -> str:
            reply = await site.complete(max_tokens=7, **fields)
            return str(reply.json()["choices"][0]["message"]["content"])

        assert await content() == "abuser"
        assert await content(skip_special_tokens=False) == "ab<|im_start|>user"
        assert await content(stop=["<|im_start|>user"]) == "ab"
        assert await content(stop=["<|im_start|>user"], skip_special_tokens=False) == "ab"
        assert await content(stop=["bu"]) == "a"
        assert await content(stop=["se", ""], include_stop_str_in_output=True) == "abuse"
        await content(stop=["<|im_start|>"])
        assert 1 in site.engine.requests[-1].sampling.stop_ids
