"""POST /chat: today's shape, and those of older clients."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.settings import Limits

pytestmark = pytest.mark.anyio


def say(tokenizer: Any, text: str) -> Any:
    """Return a script that answers with the tokens of `text`."""
    return lambda request: tokenizer.encode(text)


async def test_prompt_is_answered_under_result(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "fine")) as site:
        reply = await site.chat("how are you")
    assert reply.status_code == 200
    prompt_tokens = len(tokenizer.encode("<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n"))
    tokens = len(tokenizer.encode("fine"))
    assert reply.json() == {
        "Result": "fine",
        "model": "base",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        },
    }


async def test_prompt_goes_through_the_chat_template(open_site: Any, tokenizer: Any) -> None:
    async with open_site() as site:
        await site.chat("hi")
        seen = tokenizer.decode(site.engine.requests[0].prompt_ids)
    assert seen == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_raw_prompt_skips_the_template(open_site: Any, tokenizer: Any) -> None:
    async with open_site() as site:
        await site.chat("once upon", raw=True)
        assert tokenizer.decode(site.engine.requests[0].prompt_ids) == "once upon"


async def test_messages_are_a_conversation(open_site: Any, tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    async with open_site() as site:
        reply = await site.client.post("/chat", json={"messages": turns})
        assert reply.status_code == 200
        assert "system\nbe brief" in tokenizer.decode(site.engine.requests[0].prompt_ids)


async def test_curl_without_a_header_just_works(open_site: Any) -> None:
    async with open_site() as site:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        reply = await site.client.post("/chat", content='{"prompt": "hi"}', headers=form)
        none = await site.client.post("/chat", content='{"prompt": "hi"}')
    assert (reply.status_code, none.status_code) == (200, 200)


async def test_other_content_types_are_415(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.client.post("/chat", files={"prompt": b"hi"})
    assert reply.status_code == 415


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_new_tokens": 3}, 3),
        ({"max_tokens": 4}, 4),
        ({"generate_kwargs": {"max_new_tokens": 5}}, 5),
        ({"generate_kwargs": {"max_new_tokens": 5}, "max_new_tokens": 9}, 5),
        ({"parameters": {"max_gen_len": 6}}, 6),
        ({"generate_kwargs": None}, 16),
        ({}, 16),
    ],
)
async def test_answer_length_by_any_of_its_names(open_site: Any, body: Any, expected: int) -> None:
    async with open_site() as site:
        await site.chat("hi", **body)
        assert site.engine.requests[0].sampling.max_new_tokens == expected


async def test_max_length_counts_the_prompt(open_site: Any) -> None:
    async with open_site() as site:
        await site.chat("hi", generate_kwargs={"max_length": 100})
        request = site.engine.requests[0]
        assert request.sampling.max_new_tokens == 100 - len(request.prompt_ids)
        refused = await site.chat("hi", max_length=5)
    assert refused.status_code == 400
    assert "max_new_tokens" in refused.json()["detail"]
    assert refused.json()["error"]["param"] == "max_length"


async def test_return_full_text_puts_the_prompt_first(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, " end")) as site:
        reply = await site.chat("the", return_full_text=True)
    assert reply.json()["Result"] == "the end"


async def test_sampling_is_the_models_own_unless_the_request_sets_it(open_site: Any) -> None:
    own = SamplingDefaults(temperature=0.7, sampled_temperature=0.7, top_p=0.9, top_k=20)
    async with open_site(defaults=own) as site:
        await site.chat()
        await site.chat(temperature=0.2, generate_kwargs={"top_k": -1, "repetition_penalty": 1.1, "seed": 7})
        await site.chat(do_sample=False, temperature=0.9)
        default, given, greedy = [request.sampling for request in site.engine.requests]
    assert (default.temperature, default.top_p, default.top_k) == (0.7, 0.9, 20)
    assert (given.temperature, given.top_k, given.repetition_penalty, given.seed) == (0.2, 0, 1.1, 7)
    assert greedy.temperature == 0


async def test_greedy_model_samples_when_the_request_does(open_site: Any) -> None:
    async with open_site() as site:
        await site.chat()
        await site.chat(top_p=0.9)
        await site.chat(do_sample=True)
        assert [r.sampling.temperature for r in site.engine.requests] == [0.0, 1.0, 1.0]


async def test_stop_strings_end_the_answer_and_free_its_sequence(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "one\nUser: two " * 9), context_tokens=4096) as site:
        reply = await site.chat(stop=["\nUser:"], max_new_tokens=120)
        assert reply.json()["Result"] == "one"
        assert reply.json()["finish_reason"] == "stop"
        await asyncio.sleep(0.01)
        assert site.engine.stats().running == 0
        assert site.engine.produced < 20


@pytest.mark.parametrize("field", ["model", "adapter"])
async def test_adapter_is_chosen_by_name(open_site: Any, field: str) -> None:
    async with open_site(adapters=["shop"]) as site:
        reply = await site.chat(**{field: "shop"})
        assert site.engine.requests[0].adapter == "shop"
        unknown = await site.chat(**{field: "nobody"})
    assert reply.json()["model"] == "shop"
    assert unknown.status_code == 404
    assert unknown.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "not_found_error",
        "param": field,
        "code": "model_not_found",
    }
    assert "base, shop" in unknown.json()["detail"]


async def test_stream_gives_chunks_and_then_how_it_ended(open_site: Any, tokenizer: Any) -> None:
    async with open_site(script=say(tokenizer, "a word 🦜")) as site:
        reply = await site.chat(stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(event["text"] for event in events) == "a word 🦜"
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == len(tokenizer.encode("a word 🦜"))


async def test_prompt_is_required(open_site: Any) -> None:
    async with open_site() as site:
        for body in ({}, {"prompt": ""}, {"prompt": None}, {"messages": []}):
            reply = await site.client.post("/chat", json=body)
            assert reply.status_code == 400
            assert reply.json()["detail"].startswith("Text generation parameter prompt required")


@pytest.mark.parametrize(
    "body",
    [
        {"num_beams": 4},
        {"generate_kwargs": {"num_return_sequences": 2}},
        {"typical_p": 0.5},
        {"raw": True, "messages": [{"role": "user", "content": "x"}], "prompt": ""},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "prompt": None, "prefix": "y"},
        {"generation_config": {"top_k": 1}},
        {"stopping_criteria": ["x"]},
    ],
)
async def test_unsupported_parameters_are_400(open_site: Any, body: Any) -> None:
    async with open_site() as site:
        reply = await site.chat(**body)
    assert reply.status_code == 400


async def test_unused_parameters_of_older_clients_are_ignored(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.chat(
            clean_up_tokenization_spaces=True,
            handle_long_generation=None,
            generate_kwargs={"early_stopping": False, "num_beams": 1, "typical_p": 1, "pad_token_id": 0},
        )
    assert reply.status_code == 200


async def test_llama2_request_shape_is_refused_by_name(open_site: Any) -> None:
    body = {"input_data": {"input_string": [[{"role": "user", "content": "a"}]]}}
    async with open_site() as site:
        for sent in (body, {**body, "prompt": "hi"}, {"input_data": {}}):
            reply = await site.client.post("/chat", json=sent)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "input_data"
            assert "send the conversation as 'messages'" in reply.json()["detail"]
        assert (await site.client.post("/generate", json={"prompts": ["a"]})).status_code == 404
        assert not site.engine.requests


async def test_model_without_a_template_continues_the_prompt(open_site: Any, tokenizer: Any) -> None:
    async with open_site(template=None) as site:
        assert (await site.chat("once")).status_code == 200
        assert tokenizer.decode(site.engine.requests[0].prompt_ids) == "once"
        refused = await site.client.post("/chat", json={"messages": [{"role": "user", "content": "x"}]})
    assert refused.status_code == 400
    assert "no chat template" in refused.json()["detail"]


async def test_order_that_the_template_refuses_is_400(open_site: Any) -> None:
    template = "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}x"
    async with open_site(template=template) as site:
        reply = await site.client.post("/chat", json={"messages": [{"role": "assistant", "content": "x"}]})
    assert reply.status_code == 400
    assert "user first" in reply.json()["detail"]


async def test_prompt_over_the_context_is_400_not_cut(open_site: Any) -> None:
    """Fault 42, first part."""
    async with open_site(context_tokens=64) as site:
        reply = await site.chat("x y z " * 100)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "context_length_exceeded"
    # OpenAI's sentence, which agents match.
    assert error["message"].startswith(
        "This model's maximum context length is 64 tokens. However, your messages"
    )


async def test_full_queue_answers_429_with_retry_after(open_site: Any) -> None:
    async with open_site(rows=1, queue=2, pace_s=0.01, limits=Limits(queue=2)) as site:
        replies = await asyncio.gather(*(site.chat() for _ in range(12)))
    codes = sorted(reply.status_code for reply in replies)
    assert codes == [200] * 3 + [429] * 9
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


async def test_engine_failure_is_500_without_its_text(open_site: Any) -> None:
    """Fault 48, first part: the request is answered, and the answer shows nothing internal."""
    async with open_site() as site:
        site.engine.failure = RuntimeError("tensor at 0x7f001122")
        reply = await site.chat()
        assert reply.status_code == 500
        assert "0x7f" not in reply.text
        site.engine.failure = None
        assert (await site.chat()).status_code == 200


async def test_engine_failure_in_a_stream_is_an_error_event(open_site: Any) -> None:
    async with open_site() as site:
        site.engine.failure, site.engine.fail_after = RuntimeError("boom"), 2
        reply = await site.chat(stream=True)
        assert site.engine.stats().running == 0
    last = [line for line in reply.text.split("\n\n") if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in reply.text


async def test_answer_over_its_time_is_408(open_site: Any) -> None:
    async with open_site(pace_s=0.05, limits=Limits(request_timeout_s=0.12)) as site:
        reply = await site.chat()
        assert reply.status_code == 408
        async with asyncio.timeout(60):
            while site.engine.stats().running:
                await asyncio.sleep(0.01)


async def test_default_adapter_answers_for_the_base(open_site: Any) -> None:
    """`--combine-adapters`: requests that name no adapter, or the base, are answered by all combined."""
    async with open_site(adapters=["combined_adapter"]) as site:
        served = site.lifecycle.served()
        site.lifecycle.ready(dataclasses.replace(served, default_adapter="combined_adapter"))
        await site.chat()
        await site.chat(model="base")
        await site.complete()
        assert [request.adapter for request in site.engine.requests] == ["combined_adapter"] * 3


@pytest.mark.parametrize("place", [None, "generate_kwargs", "parameters"])
async def test_what_generate_forbids_reaches_the_engine(open_site: Any, place: str | None) -> None:
    wanted = {
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [8],
        "begin_suppress_tokens": [9],
        "eos_token_id": [10, 11],
        "forced_eos_token_id": 12,
    }
    async with open_site() as site:
        reply = await site.chat(**({place: wanted} if place else wanted))
        assert reply.status_code == 200
        (request,) = site.engine.requests
    made = request.sampling
    assert (made.no_repeat_ngram_size, made.bad_words_ids) == (3, [[5], [6, 7]])
    assert (made.suppress_tokens, made.begin_suppress_tokens) == ([8], [9])
    assert (made.stop_ids, made.forced_eos_token_id) == ({10, 11}, [12])


async def test_min_length_counts_the_prompt_and_min_new_tokens_wins(open_site: Any) -> None:
    async with open_site() as site:
        for more in ({"min_length": 0}, {"min_length": 30}, {"min_length": 30, "min_new_tokens": 2}):
            await site.chat("hello there", generate_kwargs=more)
        beyond = await site.chat("hello there", generate_kwargs={"min_length": 10**6, "max_new_tokens": 7})
        prompt_tokens = len(site.engine.requests[0].prompt_ids)
        made = [request.sampling.min_new_tokens for request in site.engine.requests]
    assert 0 < prompt_tokens < 30
    assert made == [0, 30 - prompt_tokens, 2]
    assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "min_length")


@pytest.mark.parametrize("name", ["min_new_tokens", "min_tokens"])
async def test_an_answer_that_must_be_longer_than_it_may_be_is_refused(open_site: Any, name: str) -> None:
    async with open_site() as site:
        reply = await site.chat(**{name: 100, "max_new_tokens": 5})
        assert not site.engine.requests
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, name)
    assert f"'{name}' asks for at least 100 tokens of an answer that may have 5" in error["message"]
