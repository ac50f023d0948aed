"""POST /chat: the route this runtime is known by, and the shapes that older clients send to it.

`{"prompt"}` or `{"messages"}` in, `{"Result"}` out. Knows JSON bodies; what generation is, answers.py
knows. Start at `chat`.
"""

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import RequestError
from runtime.serving.generation import GenerationRequest, Generations, Generator
from runtime.serving.http.schema import ChatBody, GenerateFields, Message
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone
from runtime.serving.structured_output import constraint_of
from runtime.serving.tokenizer import AnswerLength


def router(answers: Generator) -> APIRouter:
    """Return the route /chat."""
    routes = APIRouter(tags=["chat"])

    @routes.post(
        "/chat", responses=STREAMED, summary="Answer a prompt or a conversation", response_model=None
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        request_id = request.state.request_id
        ask, before = await _ask(answers, body, request_id)
        batch = answers.start([ask])
        name = ask.adapter or answers.served().name
        if body.stream:
            events = _events(batch, name, before if body.return_full_text else "")
            return EventStream(events, close=batch.close, request_id=request_id)
        try:
            (whole,) = await unless_gone(request, batch.whole(), request_id=request_id)
        finally:
            batch.close()
        text = before + whole.text if body.return_full_text else whole.text
        return JSONResponse({"Result": text, **_end(batch, name, whole.finish)})

    return routes


async def _ask(answers: Generator, body: ChatBody, request_id: str) -> tuple[GenerationRequest, str]:
    """Return what to generate, and the text that `return_full_text` puts before it."""
    if body.input_data is not None:
        raise RequestError(
            "'input_data' (llama-2's request shape) is not supported; send the conversation as 'messages'",
            param="input_data",
        )
    prompts = answers.served().prompts
    param = "adapter" if body.adapter is not None else "model"
    adapter = answers.adapter(body.adapter if body.adapter is not None else body.model, param=param)
    before = (body.prefix or "") + (body.prompt or "")
    if body.messages:
        if body.raw:
            raise RequestError(
                "'raw' continues a 'prompt'; 'messages' always go through the template", param="raw"
            )
        if body.prompt:
            raise RequestError("send 'prompt' or 'messages', not both", param="prompt")
        ids = await prompts.chat(body.messages)
        continues = False
    elif not body.prompt:
        raise RequestError(
            "Text generation parameter prompt required: send 'prompt' or 'messages'", param="prompt"
        )
    elif body.raw or not prompts.template:
        ids = await prompts.text(before)
        continues = True
    else:
        ids = await prompts.chat([Message(role="user", content=before)], param="prompt")
        continues = False
    ask = GenerationRequest(ids, adapter=adapter, request_id=request_id, continues=continues)
    return await _settled(answers, ask, body.settings()), before


async def _settled(answers: Generator, ask: GenerationRequest, fields: GenerateFields) -> GenerationRequest:
    """Return `ask` with the sampling settings that `fields` ask for."""
    for name in ("num_beams", "num_return_sequences", "typical_p"):
        if getattr(fields, name) != 1:
            raise RequestError(f"'{name}' other than 1 is not supported", param=name)
    if fields.min_new_tokens is not None:
        fields = fields.model_copy(update={"min_tokens": fields.min_new_tokens})
    if fields.stop is None and fields.stop_strings is not None:
        fields = fields.model_copy(update={"stop": fields.stop_strings})
    prompts = answers.served().prompts
    sampling = prompts.sampling(
        fields, prompt_tokens=len(ask.prompt_ids), extent=_extent(fields), sample=fields.do_sample
    )
    sampling = await prompts.shaped(sampling, constraint_of(fields))
    return replace(ask, sampling=sampling, stops=fields.stops())


def _extent(fields: GenerateFields) -> AnswerLength:
    """Return the length asked for: `max_new_tokens` by any of its names before `max_length`."""
    for name in ("max_new_tokens", "max_tokens", "max_gen_len"):
        if (wanted := getattr(fields, name)) is not None:
            return AnswerLength(new_tokens=wanted, param=name)
    return AnswerLength(total_tokens=fields.max_length, param="max_length")


def _end(batch: Generations, name: str, finish: str) -> dict[str, Any]:
    return {
        "model": name,
        "finish_reason": finish,
        "usage": {
            "prompt_tokens": batch.prompt_tokens,
            "completion_tokens": batch.new_tokens,
            "total_tokens": batch.prompt_tokens + batch.new_tokens,
        },
    }


async def _events(batch: Generations, name: str, before: str) -> AsyncGenerator[dict[str, Any], None]:
    """Yield `{"text": piece}` events, and a last one that also says how the answer ended."""
    if before:
        yield {"text": before}
    async for _, piece in batch.pieces():
        if piece.finish is None:
            yield {"text": piece.text}
        else:
            yield {"text": piece.text, **_end(batch, name, piece.finish)}
