"""Event streams as clients read them: every reader in use, errors in mid-stream, clients that leave."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from runtime.errors import UnavailableError
from runtime.serving.http import sse
from tests.test_net import standard_events

pytestmark = pytest.mark.anyio

TEXT = "a\u2028b\u2029c\x85d 日本 😀"
ROUTES = ("/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses")


def body(route: str, text: str, **more: Any) -> dict[str, Any]:
    """Return a streamed request that the echo engine answers with `text`."""
    key = {"/v1/responses": "input", "/v1/chat/completions": "messages"}.get(route, "prompt")
    value = [{"role": "user", "content": text}] if key == "messages" else text
    return {key: value, "stream": True, **({"raw": True} if route == "/chat" else {}), **more}


def by_the_standard(raw: bytes) -> Iterator[str]:
    yield from standard_events(raw)


def by_splitlines(raw: bytes) -> Iterator[str]:
    """Read as clients over httpx' or requests' iter_lines do."""
    for line in raw.decode().splitlines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def by_the_openai_sdk(raw: bytes) -> Iterator[str]:
    for event in openai._streaming.SSEDecoder().iter_bytes(iter([raw])):
        yield event.data


def text_of(events: list[dict[str, Any]]) -> str:
    """Return the text that the events of any route carry."""
    found = ""
    for event in events:
        for choice in event.get("choices", [{}] if event.get("type") else [event]):
            found += choice.get("text") or choice.get("delta", {}).get("content") or ""
        found += event["delta"] if event.get("type") == "response.output_text.delta" else ""
    return found


@pytest.mark.parametrize("reader", [by_the_standard, by_splitlines, by_the_openai_sdk])
@pytest.mark.parametrize("route", ROUTES)
async def test_every_reader_finds_the_same_text(
    open_site: Any, tokenizer: Any, route: str, reader: Callable[[bytes], Iterator[str]]
) -> None:
    length = {"max_output_tokens" if route == "/v1/responses" else "max_tokens": 200}
    async with open_site(script=lambda request: tokenizer.encode(TEXT)) as site:
        reply = await site.client.post(route, json=body(route, "hi", **length))
    events = [json.loads(data) for data in reader(reply.content) if data != "[DONE]"]
    assert text_of(events) == TEXT
    assert (b"[DONE]" in reply.content) == (route != "/v1/responses")


def test_half_of_a_surrogate_pair_is_escaped() -> None:
    (data,) = standard_events(sse.event({"text": "é\ud83d"}))
    assert json.loads(data) == {"text": "é\ud83d"}


@pytest.mark.parametrize("route", ROUTES[:3])
async def test_an_error_in_mid_stream_is_the_last_event(open_site: Any, route: str) -> None:
    async with open_site() as site:
        site.engine.failure, site.engine.fail_after = UnavailableError("the engine has stopped"), 2
        reply = await site.client.post(route, json=body(route, "one two three"))
    *_, last = standard_events(reply.content)
    assert reply.status_code == 200
    assert json.loads(last) == {
        "error": {
            "message": "the engine has stopped",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
    }


async def test_a_failed_response_ends_with_its_error_and_itself(open_site: Any) -> None:
    async with open_site() as site:
        site.engine.failure, site.engine.fail_after = UnavailableError("the engine has stopped"), 2
        client = AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=site.client, max_retries=0)
        stream = await client.responses.create(model="base", input="one two three", stream=True)
        events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    error, failed = events[-2:]
    assert (error.type, error.message) == ("error", "the engine has stopped")
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error is not None
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", error.message)


async def test_the_openai_sdk_raises_an_error_in_mid_stream(open_site: Any) -> None:
    async with open_site() as site:
        site.engine.failure, site.engine.fail_after = UnavailableError("the engine has stopped"), 2
        client = AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=site.client, max_retries=0)
        stream = await client.completions.create(model="base", prompt="one two three", stream=True)
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            async for _ in stream:
                pass


async def test_comments_keep_a_stream_open_until_its_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.02)
    first = asyncio.Event()

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        await first.wait()
        yield {"text": "a"}

    sent = b""

    async def send(message: Any) -> None:
        nonlocal sent
        sent += message.get("body", b"")
        if sent.count(b": ") == 3:
            first.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    await sse.EventStream(events(), close=lambda: None, request_id="r")({}, receive, send)
    assert sent.startswith(b": still working\n\n" * 3)
    assert standard_events(sent) == ['{"text":"a"}', "[DONE]"]


async def test_no_event_is_made_while_one_is_not_sent() -> None:
    made = 0

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        nonlocal made
        while True:
            made += 1
            yield {"n": made}

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            await asyncio.Event().wait()

    closed: list[bool] = []
    stream = sse.EventStream(events(), close=lambda: closed.append(True), request_id="r")
    task = asyncio.create_task(stream({}, receive, send))
    await asyncio.sleep(0.1)
    assert made == 1
    task.cancel()
    await asyncio.wait((task,))
    assert closed == [True]
