"""Anthropic's routes: POST /v1/messages, and the tokens of a prompt at /v1/messages/count_tokens.

Knows their answers and events; what a request means is in anthropic_body.py, what generation is in
runtime/serving/generation.py. Start at `router`, then `_Blocks` for what a stream looks like.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.serving.answer_parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ParsedAnswer,
    Part,
    ReasoningDelta,
)
from runtime.serving.generation import GeneratedAnswer, GenerationGroup, Generator
from runtime.serving.http.anthropic_body import MessagesBody
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.openai import chat_prompt, chat_request
from runtime.serving.http.sse import STREAMED, EventStream, anthropic_error, unless_gone

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""Why an answer ended, in Anthropic's words."""


def router(generator: Generator) -> APIRouter:
    """Return the routes below /v1/messages."""
    routes = APIRouter(prefix="/v1", tags=["anthropic"], route_class=BodyRoute)

    @routes.post("/messages", responses=STREAMED, summary="Answer a conversation", response_model=None)
    async def messages(body: MessagesBody, request: Request) -> Response:
        request_id = request.state.request_id
        chat, wording = body.as_chat()
        generation_request = await chat_request(generator, chat, request, wording)
        group = generator.start([generation_request])
        model = generator.served().model_name(generation_request.adapter)
        json_format = MessageFormat(f"msg_{request_id}", model, shows_thoughts=body.shows_thoughts)
        if body.stream:
            return EventStream(
                _events(group, json_format),
                close=group.close,
                request_id=request_id,
                named=True,
                failed=lambda error: [anthropic_error(error)],
            )
        try:
            (answer,) = await unless_gone(request, group.complete(), request_id=request_id)
        finally:
            group.close()
        return JSONResponse(json_format.message(answer, _usage(group)))

    @routes.post("/messages/count_tokens", summary="Count the tokens of a conversation", response_model=None)
    async def count_tokens(body: MessagesBody, request: Request) -> Response:
        chat, wording = body.as_chat()
        prompt = await chat_prompt(generator, chat, wording)
        return JSONResponse({"input_tokens": len(prompt.ids)})

    return routes


class MessageFormat:
    """The JSON of one message."""

    def __init__(self, message_id: str, model: str, *, shows_thoughts: bool) -> None:
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self.shows_thoughts = shows_thoughts

    def begun(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the message before its first token."""
        return {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def message(self, answer: GeneratedAnswer, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the complete message."""
        content = list(_blocks(answer.parsed, shows_thoughts=self.shows_thoughts))
        return {**self._head, "content": content, **ended(answer.finish, answer.stop), "usage": usage}


def _blocks(parsed: ParsedAnswer, *, shows_thoughts: bool) -> Iterator[dict[str, Any]]:
    """Yield the blocks of a complete answer, which are those of its stream."""
    shown = (part for part in parsed.parts if shows_thoughts or not isinstance(part, ReasoningDelta))
    for _, alike in groupby(shown, type):
        parts = list(alike)
        text = "".join(part.text for part in parts if isinstance(part, ReasoningDelta | ContentDelta))
        if text and isinstance(parts[0], ReasoningDelta):
            yield {"type": "thinking", "thinking": text, "signature": ""}
        elif text:
            yield {"type": "text", "text": text, "citations": None}
        for call in (parsed.calls[part.index] for part in parts if isinstance(part, CallStart)):
            arguments = json.loads(call.arguments or "{}")
            yield {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def ended(finish: str, stop: str) -> dict[str, Any]:
    """Return why an answer ended, and which of the request's strings ended it."""
    if stop and finish == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": REASONS[finish], "stop_sequence": None}


def _usage(group: GenerationGroup) -> dict[str, Any]:
    """Return Anthropic's token counts: what was in the cache is no part of `input_tokens`."""
    return {
        "input_tokens": group.prompt_tokens - group.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": group.cached_tokens,
        "output_tokens": group.new_tokens,
    }


class _Blocks:
    """The blocks of one stream: each begins, has its pieces, and stops before the next begins."""

    def __init__(self, *, shows_thoughts: bool) -> None:
        self._shows_thoughts = shows_thoughts
        self._index = -1
        self._open = ""

    def events(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield the events of one part."""
        match part:
            case ReasoningDelta(text):
                if self._shows_thoughts:
                    yield from self._begin("thinking", {"thinking": "", "signature": ""})
                    yield self._delta("thinking_delta", thinking=text)
            case ContentDelta(text):
                yield from self._begin("text", {"text": "", "citations": None})
                yield self._delta("text_delta", text=text)
            case CallStart(_, call_id, name):
                yield from self.close()
                yield from self._begin("tool_use", {"id": call_id, "name": name, "input": {}})
            case CallArguments(_, text):
                yield self._delta("input_json_delta", partial_json=text)
            case CallEnd():
                yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the end of the block that is open, if one is."""
        if self._open:
            self._open = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _begin(self, kind: str, empty: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == kind:
            return
        yield from self.close()
        self._open = kind
        self._index += 1
        block = {"type": kind, **empty}
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, kind: str, **piece: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **piece}}


async def _events(group: GenerationGroup, json_format: MessageFormat) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the route's events in Anthropic's order."""
    yield {"type": "message_start", "message": json_format.begun(_usage(group))}
    yield {"type": "ping"}
    blocks = _Blocks(shows_thoughts=json_format.shows_thoughts)
    finish, stop = "stop", ""
    async for _, chunk in group.chunks():
        finish, stop = chunk.finish or finish, chunk.stop or stop
        for part in chunk.parts:
            for event in blocks.events(part):
                yield event
    for event in blocks.close():
        yield event
    yield {"type": "message_delta", "delta": ended(finish, stop), "usage": _usage(group)}
    yield {"type": "message_stop"}
