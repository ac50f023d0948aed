"""/v1/completions as evaluators use it: many prompts in one body, and their log probabilities."""

import asyncio
import json
from typing import Any

import pytest

from runtime.errors import UnavailableError
from runtime.serving.engine.protocol import Token
from tests.serving.conftest import make_sentencepiece
from tests.serving.http.test_chat import say

pytestmark = pytest.mark.anyio

FORTY = [f"prompt {number}" for number in range(40)]


async def complete(site: Any, **body: Any) -> Any:
    """Return the answer to a body, streamed or not, in the whole one's shape."""
    reply = await site.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return reply.json()
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        whole = choices.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
        whole["index"], whole["text"] = choice["index"], whole["text"] + choice["text"]
        whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
        if choice["logprobs"] is not None:
            before = whole["logprobs"] or {name: [] for name in choice["logprobs"]}
            whole["logprobs"] = {name: before[name] + choice["logprobs"][name] for name in before}
    return {"choices": [choices[index] for index in sorted(choices)], "usage": events[-1]["usage"]}


def streamed(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


@pytest.mark.parametrize("stream", [False, True])
async def test_forty_prompts_are_answered_in_their_order(
    open_site: Any, tokenizer: Any, stream: bool
) -> None:
    async with open_site(rows=4, queue=100, context_tokens=512) as site:
        answer = await complete(site, prompt=FORTY, n=2, max_tokens=12, temperature=0, **streamed(stream))
        requests = len(site.engine.requests)
    assert [choice["index"] for choice in answer["choices"]] == [*range(80)]
    for choice in answer["choices"]:  # the engine repeats the prompt, so each answer is known by its prompt
        assert choice["text"].startswith(FORTY[choice["index"] // 2] + "p")
    prompts = sum(len(tokenizer.encode(prompt)) for prompt in FORTY)
    usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    assert usage == {"prompt_tokens": prompts, "completion_tokens": 80 * 12}
    assert requests == 80


async def test_more_prompts_than_find_room_now_are_refused_before_the_first_is_queued(open_site: Any) -> None:
    async with open_site(rows=1, queue=9, pace_s=0.05) as site:
        running = asyncio.create_task(site.client.post("/v1/completions", json={"prompt": "x"}))
        while not site.engine.stats().running:
            await asyncio.sleep(0.01)
        reply = await site.client.post("/v1/completions", json={"prompt": ["y"] * 10})
        begun = len(site.engine.requests)
        fits = await site.client.post("/v1/completions", json={"prompt": ["y"] * 9, "max_tokens": 1})
        await running
    assert (reply.status_code, begun) == (429, 1)
    assert "with these 10 they were more than the 10" in reply.json()["error"]["message"]
    assert fits.status_code == 200


async def test_a_failure_of_one_prompt_ends_the_work_on_the_others(open_site: Any) -> None:
    async with open_site(rows=8, queue=40, pace_s=0.01) as site:
        site.engine.failure, site.engine.fail_after = UnavailableError("broken"), 3
        reply = await site.client.post("/v1/completions", json={"prompt": FORTY, "max_tokens": 400})
        while site.engine.stats().running or site.engine.stats().waiting:
            await asyncio.sleep(0.01)
        produced = site.engine.produced
    assert reply.status_code == 503
    assert produced < 8 * 10


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["the word 🦜", [5, 6, 7, 20]])
async def test_the_prompt_comes_with_its_tokens(
    open_site: Any, tokenizer: Any, prompt: Any, stream: bool
) -> None:
    async with open_site(script=say(tokenizer, " another")) as site:
        body = {"prompt": prompt, "echo": True, "logprobs": 2, **streamed(stream)}
        choice = (await complete(site, **body))["choices"][0]
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    logprobs = choice["logprobs"]
    assert choice["text"] == tokenizer.decode(ids) + " another"
    assert len(logprobs["tokens"]) == len(ids) + len(tokenizer.encode(" another"))
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(logprobs["tokens"]) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token) or token.startswith("bytes:")
    assert logprobs["text_offset"][len(ids)] == len(tokenizer.decode(ids))


@pytest.mark.parametrize("stream", [False, True])
async def test_no_new_token_scores_the_prompts_alone(open_site: Any, tokenizer: Any, stream: bool) -> None:
    async with open_site() as site:
        body = {"prompt": ["the word", "a"], "max_tokens": 0, "echo": True, "logprobs": 0, **streamed(stream)}
        answer = await complete(site, **body)
        plain = await complete(site, prompt="the word", max_tokens=0, echo=True, **streamed(stream))
    assert [choice["text"] for choice in answer["choices"]] == ["the word", "a"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    scored = answer["choices"][0]["logprobs"]
    assert len(scored["tokens"]) == len(tokenizer.encode("the word"))
    assert "".join(scored["tokens"]) == "the word"
    assert answer["usage"]["completion_tokens"] == 0
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == ("the word", None)


async def test_an_answer_that_ends_at_once_has_its_stop_id_behind_the_prompt(
    open_site: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluators drop the last token, as they ask for one more than the prompt has."""
    end = tokenizer.eos_token_id
    async with open_site(script=lambda _: []) as site:
        finish = site.engine._finished
        monkeypatch.setattr(
            site.engine, "_finished", lambda *args: Token(None, "stop", -0.25, (), finish(*args).start, end)
        )
        body = {"prompt": "the word", "max_tokens": 1, "logprobs": 1}
        scored = (await complete(site, echo=True, **body))["choices"][0]
        plain = (await complete(site, **body))["choices"][0]
    assert scored["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert scored["logprobs"]["token_logprobs"][-1] == -0.25
    assert scored["logprobs"]["text_offset"][-1] == len("the word") == len(scored["text"])
    assert scored["finish_reason"] == "stop"
    assert plain["logprobs"]["tokens"] == []


@pytest.mark.parametrize("strips", [False, True])
async def test_tokens_that_a_tokenizer_puts_first_are_no_text_of_the_prompt(
    open_site: Any, strips: bool
) -> None:
    used = make_sentencepiece(strips=strips)
    ids = [1, *used.encode("is the word 🦜", add_special_tokens=False)]
    async with open_site(tokenizer=used) as site:
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        choice = (await complete(site, **body))["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert choice["text"] == "is the word 🦜"
    assert (tokens[0], offsets[0]) == ("<s>", 0)
    assert [(token, offset) for token, offset in zip(tokens, offsets, strict=True) if token == " word"] == [
        (" word", 6)
    ]


@pytest.mark.parametrize("name", ["org/name", "shop.v1:latest", "registry.example/team/shop"])
async def test_a_model_is_found_by_an_id_with_slashes(open_site: Any, name: str) -> None:
    async with open_site(adapters=[name]) as site:
        plain = await site.client.get(f"/v1/models/{name}")
        escaped = await site.client.get(f"/v1/models/{name.replace('/', '%2F')}")
        unknown = await site.client.get(f"/v1/models/{name}/more")
    assert plain.json()["id"] == escaped.json()["id"] == name
    assert plain.json()["parent"] == "base"
    error = unknown.json()["error"]
    assert (unknown.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert f"model '{name}/more' is not served here" in error["message"]
    assert f"lists base, {name}" in error["message"]
