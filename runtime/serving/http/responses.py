"""POST /v1/responses: OpenAI's newer route, for text. Nothing is stored between requests.

Knows that route's JSON and events; what generation is, runtime/serving/generation.py knows. Start at
`router`, then `_generation_request`.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, Tag
from starlette.responses import JSONResponse, Response

from runtime.chat_template import TemplateFeatures
from runtime.errors import RequestError
from runtime.serving.answer_parsers.grammars import spelled
from runtime.serving.engine.protocol import Constraint
from runtime.serving.generation import GenerationGroup, GenerationRequest, Generator
from runtime.serving.http import fields, parameters
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.body_types import Body, Flag, Integer, Metadata, Name, Text, TokenCount, by_kind
from runtime.serving.http.constraint_fields import constrained, constraint
from runtime.serving.http.logprobs import Logprobs
from runtime.serving.http.messages import MOST_MESSAGES, Message, turns_of, with_contents
from runtime.serving.http.schema import MAX_LOGPROBS, SamplingFields
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone
from runtime.serving.structured_output.constraints import json_object

LOGPROBS = "message.output_text.logprobs"
Entries = Sequence[dict[str, Any]]
"""Log probabilities of the answer's tokens, one entry a token."""


class Item(Message):
    """One item of `input`: a message, or the reasoning of an answer, which is not shown again."""

    type: Name = "message"
    role: Name = ""


class Format(Body):
    """What the answer must be: text, json_object, or json_schema with its schema."""

    treatments = fields.FORM

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "answer"
    description: Text | None = None
    """Ignored."""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag = False
    """Refuse a schema that cannot be enforced in all its parts."""


class TextFormat(Body):
    """How the answer's text is constrained."""

    treatments = fields.FORM

    format: Format = Format()


Inputs = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        list[Item],
        Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
        BeforeValidator(with_contents),
        Tag("<items>"),
    ],
    by_kind("a string or a list of items", {str: "<text>", list: "<items>"}),
]


class ResponsesBody(SamplingFields):
    """POST /v1/responses."""

    treatments = fields.RESPONSES

    input: Inputs
    model: Name | None = None
    instructions: Text | None = None
    """A system turn before the input."""
    max_output_tokens: TokenCount | None = None
    stream: Flag = False
    text: TextFormat | None = None
    """What the answer must be: text, json_object or json_schema."""
    include: Annotated[list[Name], Field(max_length=16, fail_fast=True)] | None = None
    """`message.output_text.logprobs` reports log probabilities; of nothing else there is more to include."""
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Alternatives reported per token, with that."""
    metadata: Metadata | None = None
    """Sent back with the answer."""


def router(generator: Generator) -> APIRouter:
    """Return the route /v1/responses."""
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=BodyRoute)

    @routes.post("/responses", responses=STREAMED, summary="Answer an input (text)", response_model=None)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        request_id = request.state.request_id
        generation_request = await _generation_request(generator, body, request)
        group = generator.start([generation_request])
        model = generator.served().model_name(generation_request.adapter)
        logprobs = Logprobs(generator.served().tokenizer)
        json_format = _ResponseFormat(body, generation_request, model, group=group, logprobs=logprobs)
        if body.stream:
            events = _events(group, json_format)
            return EventStream(
                events, close=group.close, request_id=request_id, named=True, failed=json_format.failed
            )
        try:
            (answer,) = await unless_gone(request, group.complete(), request_id=request_id)
        finally:
            group.close()
        logged = json_format.logprobs.response(answer.tokens)
        return JSONResponse(json_format.response(answer.text, answer.finish, logged))

    return routes


async def _generation_request(
    generator: Generator, body: ResponsesBody, request: Request
) -> GenerationRequest:
    adapter = await generator.adapter_for(body.model)
    tokenizer = generator.served().tokenizer_for(adapter)
    ids = await tokenizer.prompt_from_chat(_turns(body, tokenizer.features()), param="input")
    length = parameters.AnswerLength(body.max_output_tokens, param="max_output_tokens")
    sampling = await parameters.sampling(
        body,
        tokenizer,
        max_new_tokens=parameters.max_new_tokens(length, tokenizer, prompt_tokens=len(ids)),
        top_logprobs=_top_logprobs(body),
    )
    form = generator.served().form_for(adapter)
    asked = spelled(form, _constraint(body), None, prompt=tokenizer.end_of(ids), special=tokenizer.special)
    sampling = await constrained(request, tokenizer, sampling, asked)
    request_id = request.state.request_id
    return GenerationRequest(ids, sampling, parameters.text_rules(body), adapter, request_id, form=form)


def _top_logprobs(body: ResponsesBody) -> int | None:
    """Return how many alternatives to report per token, None for no log probabilities at all."""
    if body.include is not None and LOGPROBS in body.include:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError(f"'top_logprobs' needs '{LOGPROBS}' in 'include'", param="top_logprobs")
    return None


def _turns(body: ResponsesBody, features: TemplateFeatures) -> list[dict[str, Any]]:
    """Return the instructions and the input as chat templates know them."""
    turns = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        if item.type not in {"message", "reasoning"}:
            raise RequestError(
                f"'input[{index}].type' is '{item.type[:40]}'; items of type 'message' are served here",
                param=f"input[{index}]",
            )
        if item.type == "message" and not item.role:
            raise RequestError(f"'input[{index}].role' is missing", param=f"input[{index}].role")
    # What the model thought is not shown to it again: an item of its own is no turn.
    return turns + turns_of([item for item in body.input if item.type == "message"], features, param="input")


def _constraint(body: ResponsesBody) -> Constraint | None:
    text_format = body.text.format if body.text else Format()
    if text_format.type == "text":
        return constraint(body)
    if text_format.type == "json_object" or text_format.schema_ is None:
        return json_object("text.format")
    return Constraint("schema", text_format.schema_, "text.format", strict=text_format.strict)


class _ResponseFormat:
    """The JSON of one response, at its beginning and at its end."""

    def __init__(
        self,
        body: ResponsesBody,
        request: GenerationRequest,
        model: str,
        *,
        group: GenerationGroup,
        logprobs: Logprobs,
    ) -> None:
        self._group = group
        self.logprobs = logprobs
        self._events = 0
        self.item_id = f"msg_{request.request_id}"
        self._head: dict[str, Any] = {
            "id": f"resp_{request.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.sampling.temperature,
            "text": (body.text or TextFormat()).model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": request.sampling.top_logprobs or 0,
            "top_p": request.sampling.top_p,
        }

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event of type `kind` with the next number of this stream."""
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **fields}

    def in_progress(self) -> dict[str, Any]:
        """Return the response before its first token."""
        return self._without_answer("in_progress")

    def failed(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events that end a stream with `error`: what went wrong, and the response it ended."""
        ours = error["type"] == "server_error"  # the one of OpenAI's codes for whatever is not the client's
        code = "server_error" if ours else error["code"] or error["type"]
        message, param = error["message"], error["param"]
        response = self._without_answer("failed") | {"error": {"code": code, "message": message}}
        return [
            self.event("error", code=code, message=message, param=param),
            self.event("response.failed", response=response),
        ]

    def _without_answer(self, status: str) -> dict[str, Any]:
        return {**self._head, "status": status, "incomplete_details": None, "output": [], "usage": None}

    def item(self, text: str | None, status: str, logprobs: Entries = ()) -> dict[str, Any]:
        """Return the one output item; `text` None is the item before its first token."""
        content = [] if text is None else [self.part(text, logprobs)]
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def part(self, text: str, logprobs: Entries = ()) -> dict[str, Any]:
        """Return the one content part of the item."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}

    def response(self, text: str, finish: str, logprobs: Entries) -> dict[str, Any]:
        """Return the response with its answer."""
        truncated = finish == "length"
        status = "incomplete" if truncated else "completed"
        group = self._group
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if truncated else None,
            "output": [self.item(text, status, logprobs)],
            "usage": {
                "input_tokens": group.prompt_tokens,
                "input_tokens_details": {"cached_tokens": group.cached_tokens},
                "output_tokens": group.new_tokens,
                "output_tokens_details": {"reasoning_tokens": group.reasoning_tokens},
                "total_tokens": group.prompt_tokens + group.new_tokens,
            },
        }


async def _events(
    group: GenerationGroup, json_format: _ResponseFormat
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the route's events in OpenAI's order, numbered."""
    at = {"item_id": json_format.item_id, "output_index": 0, "content_index": 0}

    def numbered(kind: str, **fields: Any) -> dict[str, Any]:
        return json_format.event(f"response.{kind}", **fields)

    yield numbered("created", response=json_format.in_progress())
    yield numbered("in_progress", response=json_format.in_progress())
    yield numbered("output_item.added", output_index=0, item=json_format.item(None, "in_progress"))
    yield numbered("content_part.added", **at, part=json_format.part(""))
    text, finish, logprobs = "", "stop", list[dict[str, Any]]()
    async for _, chunk in group.chunks():
        text += chunk.text
        finish = chunk.finish or finish
        logged = json_format.logprobs.response(chunk.tokens)
        logprobs += logged
        if chunk.text or logged:
            yield numbered("output_text.delta", **at, delta=chunk.text, logprobs=logged)
    response = json_format.response(text, finish, logprobs)
    yield numbered("output_text.done", **at, text=text, logprobs=logprobs)
    yield numbered("content_part.done", **at, part=json_format.part(text, logprobs))
    yield numbered("output_item.done", output_index=0, item=response["output"][0])
    yield numbered("incomplete" if finish == "length" else "completed", response=response)
