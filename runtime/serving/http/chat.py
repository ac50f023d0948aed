"""POST /chat: the route this runtime is known by. `{"prompt"}` or `{"messages"}` in, `{"Result"}` out.

Knows this route's JSON; what generation is, runtime/serving/generation.py knows. Start at `router`, then
`_generation_request`.
"""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import RequestError
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.grammars import spelled
from runtime.serving.answer_parsers.parts import ReasoningDelta
from runtime.serving.generation import GenerationGroup, GenerationRequest, Generator
from runtime.serving.http import parameters
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.constraint_fields import constrained, constraint
from runtime.serving.http.messages import turns_of
from runtime.serving.http.schema import ChatBody, GenerateFields
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone
from runtime.serving.tokenizer import PromptTokenizer


def router(generator: Generator) -> APIRouter:
    """Return the route /chat."""
    routes = APIRouter(tags=["chat"], route_class=BodyRoute)

    @routes.post(
        "/chat", responses=STREAMED, summary="Answer a prompt or a conversation", response_model=None
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        request_id = request.state.request_id
        generation_request = await _generation_request(generator, body, request)
        group = generator.start([generation_request])
        model = generator.served().model_name(generation_request.adapter)
        prefix = _prompt_text(body) if body.return_full_text else ""
        if body.stream:
            return EventStream(_events(group, model, prefix), close=group.close, request_id=request_id)
        try:
            (answer,) = await unless_gone(request, group.complete(), request_id=request_id)
        finally:
            group.close()
        thought = {"reasoning": answer.parsed.reasoning} if answer.parsed.reasoning else {}
        return JSONResponse(
            {"Result": prefix + answer.text, **thought, **_summary(group, model, answer.finish)}
        )

    return routes


async def _generation_request(generator: Generator, body: ChatBody, request: Request) -> GenerationRequest:
    if body.input_data is not None:
        raise RequestError(
            "'input_data' (llama-2's request shape) is not supported; send the conversation as 'messages'",
            param="input_data",
        )
    param = "adapter" if body.adapter is not None else "model"
    adapter = await generator.adapter_for(
        body.adapter if body.adapter is not None else body.model, param=param
    )
    tokenizer = generator.served().tokenizer_for(adapter)
    continues_prompt = not body.messages and (body.raw or not tokenizer.has_chat_template)
    ids = await _prompt_ids(body, tokenizer, continues_prompt=continues_prompt)
    fields = body.merged_parameters()
    longest = parameters.max_new_tokens(_length(fields), tokenizer, prompt_tokens=len(ids))
    shortest, param = _shortest(fields, prompt_tokens=len(ids))
    parameters.check_shortest(shortest, longest, param=param)
    fields = _canonical(fields, shortest)
    sampling = await parameters.sampling(
        fields,
        tokenizer,
        max_new_tokens=longest,
        sample=fields.do_sample,
    )
    form = AnswerForm() if continues_prompt else generator.served().form_for(adapter)
    asked = spelled(form, constraint(fields), None, prompt=tokenizer.end_of(ids), special=tokenizer.special)
    return GenerationRequest(
        ids,
        await constrained(request, tokenizer, sampling, asked),
        text=parameters.text_rules(fields),
        adapter=adapter,
        request_id=request.state.request_id,
        continues_prompt=continues_prompt,
        form=form,
    )


def _prompt_text(body: ChatBody) -> str:
    return (body.prefix or "") + (body.prompt or "")


async def _prompt_ids(
    body: ChatBody, tokenizer: PromptTokenizer, *, continues_prompt: bool
) -> tuple[int, ...]:
    if body.messages:
        if body.raw:
            raise RequestError(
                "'raw' continues a 'prompt'; 'messages' always go through the template", param="raw"
            )
        if body.prompt:
            raise RequestError("send 'prompt' or 'messages', not both", param="prompt")
        if body.prefix:
            raise RequestError("'prefix' is put before a 'prompt', and there is none", param="prefix")
        return await tokenizer.prompt_from_chat(turns_of(body.messages, tokenizer.features()))
    if not body.prompt:
        raise RequestError(
            "Text generation parameter prompt required: send 'prompt' or 'messages'", param="prompt"
        )
    text = _prompt_text(body)
    if continues_prompt:
        return await tokenizer.prompt_from_text(text)
    return await tokenizer.prompt_from_chat([{"role": "user", "content": text}], param="prompt")


def _canonical(fields: GenerateFields, shortest: int) -> GenerateFields:
    """Return `fields` with transformers' names replaced by those of `SamplingFields`."""
    for name in ("num_beams", "num_return_sequences", "typical_p"):
        if getattr(fields, name) != 1:
            raise RequestError(f"'{name}' other than 1 is not supported", param=name)
    renamed: dict[str, Any] = {"min_tokens": shortest}
    if fields.stop is None and fields.stop_strings is not None:
        renamed["stop"] = fields.stop_strings
    return fields.model_copy(update=renamed)


def _shortest(fields: GenerateFields, *, prompt_tokens: int) -> tuple[int, str]:
    """Return the tokens that the answer has at least, and the field that says it."""
    if fields.min_new_tokens is not None:
        return fields.min_new_tokens, "min_new_tokens"
    if fields.min_tokens is None and fields.min_length is not None:
        return max(0, fields.min_length - prompt_tokens), "min_length"
    return fields.min_tokens or 0, "min_tokens"


def _length(fields: GenerateFields) -> parameters.AnswerLength:
    """Return the requested length: `max_new_tokens` by any of its names before `max_length`."""
    for name in ("max_new_tokens", "max_tokens", "max_gen_len"):
        if (new_tokens := getattr(fields, name)) is not None:
            return parameters.AnswerLength(new_tokens=new_tokens, param=name)
    return parameters.AnswerLength(total_tokens=fields.max_length, param="max_length")


def _summary(group: GenerationGroup, model: str, finish: str) -> dict[str, Any]:
    return {
        "model": model,
        "finish_reason": finish,
        "usage": {
            "prompt_tokens": group.prompt_tokens,
            "completion_tokens": group.new_tokens,
            "total_tokens": group.prompt_tokens + group.new_tokens,
        },
    }


async def _events(group: GenerationGroup, model: str, prefix: str) -> AsyncGenerator[dict[str, Any], None]:
    """Yield `{"text": …}` events, with `reasoning` those of a thought; the last says how the answer ended."""
    if prefix:
        yield {"text": prefix}
    async for _, chunk in group.chunks():
        thought = "".join(part.text for part in chunk.parts if isinstance(part, ReasoningDelta))
        event = {"text": chunk.text, **({"reasoning": thought} if thought else {})}
        if chunk.finish is not None:
            yield {**event, **_summary(group, model, chunk.finish)}
        elif chunk.parts:
            yield event
