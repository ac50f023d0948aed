"""POST /v1/responses: OpenAI's newer route, for text. Nothing is stored between requests.

Knows that route's JSON and events; what generation is, answers.py knows. Start at `_ask`.
"""

import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from runtime.errors import RequestError
from runtime.serving import structured_output
from runtime.serving.generation import GenerationRequest, Generations, Generator
from runtime.serving.http.schema import Body, Message, Name, SamplingFields, Text, TextPart, TokenCount
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone
from runtime.serving.tokenizer import AnswerLength


class Item(Message):
    """One item of `input`: a message; its text parts are called input_text and output_text."""

    type: Name = "message"

    def as_message(self, index: int) -> Message:
        """Return the item as a message of a conversation."""
        if self.type != "message":
            raise RequestError(
                f"input items of type '{self.type}' are not served here", param=f"input[{index}]"
            )
        content = self.content
        if isinstance(content, list):
            texts = {"input_text", "output_text", "text"}
            content = [
                TextPart(type="text" if part.type in texts else part.type, text=part.text) for part in content
            ]
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content=content)


class Format(Body):
    """The form of the answer: text, json_object, or json_schema with its schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextFormat(Body):
    """How the text of the answer is to be."""

    format: Format = Format()


class ResponsesBody(SamplingFields):
    """POST /v1/responses."""

    input: Text | list[Item]
    model: Name | None = None
    instructions: Text | None = None
    """A system turn before the input."""
    max_output_tokens: TokenCount | None = None
    stream: bool = False
    previous_response_id: Name | None = None
    """Refused: nothing is stored."""
    tools: list[Any] | None = None
    text: TextFormat | None = None
    """The form the answer must have."""
    metadata: dict[Name, Text] | None = Field(None, max_length=16)


def router(answers: Generator) -> APIRouter:
    """Return the route."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.post("/responses", responses=STREAMED, summary="Answer an input (text)", response_model=None)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        request_id = request.state.request_id
        ask = await _ask(answers, body, request_id)
        batch = answers.start([ask])
        shape = _Shape(body, ask, ask.adapter or answers.served().name, batch)
        if body.stream:
            events = _events(batch, shape)
            return EventStream(events, close=batch.close, request_id=request_id, named=True)
        try:
            (whole,) = await unless_gone(request, batch.whole(), request_id=request_id)
        finally:
            batch.close()
        return JSONResponse(shape.response(whole.text, whole.finish))

    return routes


async def _ask(answers: Generator, body: ResponsesBody, request_id: str) -> GenerationRequest:
    for name in ("previous_response_id", "tools"):
        if getattr(body, name):
            raise RequestError(f"'{name}' is not supported here", param=name)
    adapter = answers.adapter(body.model)
    if isinstance(body.input, str):
        turns = [Message(role="user", content=body.input)]
    else:
        turns = [item.as_message(index) for index, item in enumerate(body.input)]
    if body.instructions:
        turns.insert(0, Message(role="system", content=body.instructions))
    prompts = answers.served().prompts
    ids = await prompts.chat(turns, param="input")
    extent = AnswerLength(body.max_output_tokens, param="max_output_tokens")
    sampling = prompts.sampling(body, prompt_tokens=len(ids), extent=extent)
    sampling = await prompts.shaped(sampling, _form(body))
    return GenerationRequest(ids, sampling, body.stops(), adapter, request_id)


def _form(body: ResponsesBody) -> structured_output.Constraint | None:
    form = body.text.format if body.text else Format()
    if form.type == "text":
        return structured_output.constraint_of(body)
    if form.type == "json_object" or form.schema_ is None:
        return structured_output.json_object("text.format")
    return structured_output.Constraint("schema", form.schema_, "text.format")


class _Shape:
    """The JSON of one response, at its beginning and at its end."""

    def __init__(self, body: ResponsesBody, ask: GenerationRequest, name: str, batch: Generations) -> None:
        self._batch = batch
        self.item_id = f"msg_{ask.request_id}"
        self._head: dict[str, Any] = {
            "id": f"resp_{ask.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": name,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": ask.sampling.temperature,
            "text": (body.text or TextFormat()).model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "none",
            "tools": [],
            "top_p": ask.sampling.top_p,
        }

    def begun(self) -> dict[str, Any]:
        """Return the response before its first token."""
        return {
            **self._head,
            "status": "in_progress",
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        """Return the one output item; `text` None is its beginning."""
        content = [] if text is None else [self.part(text)]
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def part(self, text: str) -> dict[str, Any]:
        """Return the one content part of the item."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def response(self, text: str, finish: str) -> dict[str, Any]:
        """Return the response with its answer."""
        cut = finish == "length"
        status = "incomplete" if cut else "completed"
        batch = self._batch
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self.item(text, status)],
            "usage": {
                "input_tokens": batch.prompt_tokens,
                "input_tokens_details": {"cached_tokens": batch.cached_tokens},
                "output_tokens": batch.new_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": batch.prompt_tokens + batch.new_tokens,
            },
        }


async def _events(batch: Generations, shape: _Shape) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the route's events in OpenAI's order, numbered."""
    number = 0
    at = {"item_id": shape.item_id, "output_index": 0, "content_index": 0}

    def numbered(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number - 1, **fields}

    yield numbered("created", response=shape.begun())
    yield numbered("in_progress", response=shape.begun())
    yield numbered("output_item.added", output_index=0, item=shape.item(None, "in_progress"))
    yield numbered("content_part.added", **at, part=shape.part(""))
    text, finish = "", "stop"
    async for _, piece in batch.pieces():
        text += piece.text
        finish = piece.finish or finish
        if piece.text:
            yield numbered("output_text.delta", **at, delta=piece.text, logprobs=[])
    whole = shape.response(text, finish)
    yield numbered("output_text.done", **at, text=text, logprobs=[])
    yield numbered("content_part.done", **at, part=shape.part(text))
    yield numbered("output_item.done", output_index=0, item=whole["output"][0])
    yield numbered("incomplete" if finish == "length" else "completed", response=whole)
