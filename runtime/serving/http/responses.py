"""POST /v1/responses: OpenAI's newer route, for text, thoughts and calls. Nothing is stored between requests.

Knows that route's JSON and events; what a request means is in responses_body.py, what generation is in
runtime/serving/generation.py. Start at `router`, then `_Output`, which is the answer streamed and whole.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.serving.answer_parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    Part,
    ReasoningDelta,
)
from runtime.serving.generation import AnswerChunk, GenerationGroup, GenerationRequest, Generator
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.logprobs import Logprobs
from runtime.serving.http.openai import chat_request
from runtime.serving.http.responses_body import ResponsesBody, TextFormat
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone

Event = dict[str, Any]


def router(generator: Generator) -> APIRouter:
    """Return the route /v1/responses."""
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=BodyRoute)

    @routes.post("/responses", responses=STREAMED, summary="Answer an input (text)", response_model=None)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        request_id = request.state.request_id
        generation_request = await _generation_request(generator, body, request)
        group = generator.start([generation_request])
        model = generator.served().model_name(generation_request.adapter)
        output = _Output(request_id, Logprobs(generator.served().tokenizer))
        json_format = _ResponseFormat(body, generation_request, model, group=group)
        events = _events(group, output, json_format)
        if body.stream:
            return EventStream(
                events, close=group.close, request_id=request_id, named=True, failed=json_format.failed
            )
        try:
            response = await unless_gone(request, _last_response(events), request_id=request_id)
        finally:
            group.close()
        return JSONResponse(response)

    return routes


async def _generation_request(
    generator: Generator, body: ResponsesBody, request: Request
) -> GenerationRequest:
    chat, wording = body.as_chat()
    return await chat_request(generator, chat, request, wording)


async def _last_response(events: AsyncGenerator[Event, None]) -> Event:
    """Return the response that the last event of a stream has."""
    last: Event = {}
    async for event in events:
        last = event
    response: Event = last["response"]
    return response


class _Output:
    """The items of one answer as they come: each is added, grows by deltas, and is done before the next."""

    def __init__(self, request_id: str, logprobs: Logprobs) -> None:
        self.items: list[Event] = []
        self._request_id = request_id
        self._logprobs = logprobs
        self._open: Event | None = None
        self._text = ""
        self._entries: list[Event] = []

    def events(self, chunk: AnswerChunk) -> Iterator[Event]:
        """Yield the events of one chunk, without their numbers."""
        entries = self._logprobs.response(chunk.tokens)
        said = any(isinstance(part, ContentDelta) for part in chunk.parts)
        for part in chunk.parts:
            yield from self._part(part, entries if isinstance(part, ContentDelta) else [])
            entries = [] if isinstance(part, ContentDelta) else entries
        if entries and not said and self._open is not None and self._open["type"] == "message":
            yield from self._said("", entries)

    def finish(self, status: str) -> Iterator[Event]:
        """Yield the events of the end; an answer has a message or calls, unless it is a thought cut short."""
        if not self.items or (status == "completed" and self.items[-1]["type"] == "reasoning"):
            yield from self._begin("message")
        yield from self._close(status)

    def _part(self, part: Part, entries: list[Event]) -> Iterator[Event]:
        match part:
            case ReasoningDelta(text):
                yield from self._begin("reasoning")
                self._text += text
                yield self._event("reasoning_text.delta", content_index=0, delta=text)
            case ContentDelta(text):
                yield from self._begin("message")
                yield from self._said(text, entries)
            case CallStart(_, call_id, name):
                yield from self._close("completed")
                yield from self._begin("function_call", call_id=call_id, name=name, arguments="")
            case CallArguments(_, text):
                self._text += text
                yield self._event("function_call_arguments.delta", delta=text)
            case CallEnd():
                yield from self._close("completed")

    def _said(self, text: str, entries: list[Event]) -> Iterator[Event]:
        self._text += text
        self._entries += entries
        yield self._event("output_text.delta", content_index=0, delta=text, logprobs=entries)

    def _begin(self, kind: str, **own: str) -> Iterator[Event]:
        """Yield the events that open an item of this kind, unless one is open."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._close("completed")
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        number = f"_{len(self.items)}" if self.items else ""
        item: Event = {"id": f"{prefix}_{self._request_id}{number}", "type": kind, "status": "in_progress"}
        item |= {"message": {"role": "assistant", "content": []}, "reasoning": _THOUGHT}.get(kind, own)
        self.items.append(item)
        self._open, self._text, self._entries = item, "", []
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}
        if kind != "function_call":
            yield self._event("content_part.added", content_index=0, part=self._content(kind))

    def _close(self, status: str) -> Iterator[Event]:
        """Yield the events that end the open item, if there is one."""
        if (item := self._open) is None:
            return
        kind, text = item["type"], self._text
        if kind == "function_call":
            item["arguments"] = text
            yield self._event("function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = self._content(kind)
            item["content"] = [part]
            logged = {"logprobs": self._entries} if kind == "message" else {}
            done = "output_text.done" if kind == "message" else "reasoning_text.done"
            yield self._event(done, content_index=0, text=text, **logged)
            yield self._event("content_part.done", content_index=0, part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        self._open = None

    def _content(self, kind: str) -> Event:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {
            "type": "output_text",
            "text": self._text,
            "annotations": [],
            "logprobs": list(self._entries),
        }

    def _event(self, kind: str, **own: Any) -> Event:
        at = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **at, **own}


_THOUGHT: Event = {"summary": [], "content": [], "encrypted_content": None}


class _ResponseFormat:
    """The JSON of one response, at its beginning and at its end, and the numbers of its events."""

    def __init__(
        self, body: ResponsesBody, request: GenerationRequest, model: str, *, group: GenerationGroup
    ) -> None:
        self._group = group
        self._events = 0
        chosen = body.tool_choice if isinstance(body.tool_choice, str) else None
        choice = chosen or (body.tool_choice.model_dump() if body.tool_choice else "auto")  # type: ignore[union-attr]
        self._head: Event = {
            "id": f"resp_{request.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": request.sampling.temperature,
            "text": (body.text or TextFormat()).model_dump(by_alias=True, exclude_none=True),
            "tool_choice": choice,
            "tools": [{"strict": None, **tool.model_dump()} for tool in body.tools or ()],
            "top_logprobs": request.sampling.top_logprobs or 0,
            "top_p": request.sampling.top_p,
        }

    def numbered(self, event: Event) -> Event:
        """Return an event with the next number of this stream."""
        self._events += 1
        return {**event, "sequence_number": self._events - 1}

    def begun(self, kind: str) -> Event:
        """Return an event of the response before its first token."""
        return self.numbered({"type": f"response.{kind}", "response": self._without_answer("in_progress")})

    def failed(self, error: Event) -> list[Event]:
        """Return the events that end a stream with `error`: what went wrong, and the response it ended."""
        ours = error["type"] == "server_error"  # the one of OpenAI's codes for whatever is not the client's
        code = "server_error" if ours else error["code"] or error["type"]
        message, param = error["message"], error["param"]
        response = self._without_answer("failed") | {"error": {"code": code, "message": message}}
        return [
            self.numbered({"type": "error", "code": code, "message": message, "param": param}),
            self.numbered({"type": "response.failed", "response": response}),
        ]

    def ended(self, status: str, items: list[Event]) -> Event:
        """Return the event of the response with its answer."""
        group = self._group
        response = {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": items,
            "usage": {
                "input_tokens": group.prompt_tokens,
                "input_tokens_details": {"cached_tokens": group.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": group.new_tokens,
                "output_tokens_details": {"reasoning_tokens": group.reasoning_tokens},
                "total_tokens": group.prompt_tokens + group.new_tokens,
            },
        }
        return self.numbered({"type": f"response.{status}", "response": response})

    def _without_answer(self, status: str) -> Event:
        return {**self._head, "status": status, "incomplete_details": None, "output": [], "usage": None}


async def _events(
    group: GenerationGroup, output: _Output, json_format: _ResponseFormat
) -> AsyncGenerator[Event, None]:
    """Yield the route's events in OpenAI's order, numbered."""
    yield json_format.begun("created")
    yield json_format.begun("in_progress")
    status = "completed"
    async for _, chunk in group.chunks():
        status = "incomplete" if chunk.finish == "length" else status
        for event in output.events(chunk):
            yield json_format.numbered(event)
    for event in output.finish(status):
        yield json_format.numbered(event)
    yield json_format.ended(status, output.items)
