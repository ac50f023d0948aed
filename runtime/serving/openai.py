"""The OpenAI routes: /v1/chat/completions, /v1/completions and /v1/models.

Knows OpenAI's JSON, nothing of how text is made (answers.py). Start at `_ask_chat` for what a request
means and choices.py for what an answer looks like.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import RequestError
from runtime.serving import guided
from runtime.serving.answers import Answers, Ask, Batch
from runtime.serving.choices import Chat, Completion
from runtime.serving.prompts import Extent
from runtime.serving.replies import STREAMED, EventStream, unless_gone
from runtime.serving.schema import ChatCompletionBody, CompletionBody, OpenAIFields, ToolChoice


def router(answers: Answers) -> APIRouter:
    """Return the /v1 routes for text."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.get("/models", summary="The base model and its adapters", response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": model_list(answers)})

    @routes.get("/models/{name}", summary="One model", response_model=None)
    async def model(name: str) -> Response:
        answers.adapter(name)
        return JSONResponse(next(entry for entry in model_list(answers) if entry["id"] == name))

    @routes.post(
        "/chat/completions", responses=STREAMED, summary="Answer a conversation", response_model=None
    )
    async def chat_completions(body: ChatCompletionBody, request: Request) -> Response:
        ask = await _ask_chat(answers, body, request.state.request_id)
        form = Chat(answers.served().prompts, body.logprobs, tool_names(body))
        return await _respond(answers, [ask], body, request, form)

    @routes.post("/completions", responses=STREAMED, summary="Continue a text", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        asks, echoes = await _ask_texts(answers, body, request.state.request_id)
        form = Completion(answers.served().prompts, body.logprobs, echoes)
        return await _respond(answers, asks, body, request, form)

    return routes


def model_list(answers: Answers) -> list[dict[str, Any]]:
    """Return what is served as OpenAI's model objects, the base first; adapters name it as parent."""
    served = answers.served()
    base, *adapters = served.models()
    entry = {"object": "model", "created": served.created, "owned_by": "runtime"}
    context = served.prompts.context_tokens
    return [
        {"id": base, **entry, "root": base, "parent": None, "max_model_len": context},
        *({"id": name, **entry, "root": name, "parent": base, "max_model_len": context} for name in adapters),
    ]


async def _ask_chat(answers: Answers, body: ChatCompletionBody, request_id: str) -> Ask:
    _check_common(body)
    for name in ("functions", "audio", "modalities"):
        value = getattr(body, name)
        if value and value != ["text"]:
            raise RequestError(f"'{name}' is not supported here", param=name)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    adapter = answers.adapter(body.model)
    prompts = answers.served().prompts
    names = tool_names(body)
    if names and "tools" not in prompts.template:
        raise RequestError("this model's chat template knows no tools", param="tools")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if names else None
    ids = await prompts.chat(body.messages, tools=tools)
    if body.max_completion_tokens is not None:
        extent = Extent(body.max_completion_tokens, param="max_completion_tokens")
    else:
        extent = Extent(body.max_tokens)
    sampling = prompts.sampling(
        body,
        prompt_tokens=len(ids),
        extent=extent,
        sample=_sample(body),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    form = guided.form_of(body) or _forced_call(body)
    return Ask(ids, await prompts.shaped(sampling, form), body.stops(), adapter, request_id)


def _forced_call(body: ChatCompletionBody) -> guided.Form | None:
    """Return the form of an answer that must be a call: `tool_choice` "required" or a named function."""
    choice = body.tool_choice
    if not body.tools or choice is None or choice in {"auto", "none"}:
        return None
    tools = [tool.function for tool in body.tools]
    if isinstance(choice, ToolChoice):
        wanted = choice.function.name
        tools = [tool for tool in tools if tool.name == wanted]
        if not tools:
            raise RequestError(f"'tool_choice' names '{wanted}', which is no tool here", param="tool_choice")
    return guided.call_to(((tool.name, tool.parameters) for tool in tools), "tool_choice")


def tool_names(body: ChatCompletionBody) -> frozenset[str]:
    """Return the functions the model may call; none for `tool_choice` "none"."""
    if not body.tools or body.tool_choice == "none":
        return frozenset()
    if (other := next((tool.type for tool in body.tools if tool.type != "function"), None)) is not None:
        raise RequestError(f"tools of type '{other}' are not supported here", param="tools")
    return frozenset(tool.function.name for tool in body.tools)


async def _ask_texts(answers: Answers, body: CompletionBody, request_id: str) -> tuple[list[Ask], list[str]]:
    """Return what to generate for each prompt, and the prompts' texts that `echo` puts first."""
    _check_common(body)
    if body.suffix:
        raise RequestError("'suffix' is not supported here", param="suffix")
    if body.best_of is not None and body.best_of != body.n:
        raise RequestError("'best_of' other than 'n' is not supported here", param="best_of")
    if body.echo and body.logprobs is not None:
        raise RequestError("'logprobs' of the prompt ('echo') are not supported here", param="logprobs")
    adapter = answers.adapter(body.model)
    form = guided.form_of(body)
    prompts = answers.served().prompts
    asks, echoes = [], []
    for prompt in _prompts(body.prompt):
        ids = await prompts.text(prompt) if isinstance(prompt, str) else prompts.ids(prompt)
        sampling = prompts.sampling(
            body, prompt_tokens=len(ids), extent=Extent(body.max_tokens), sample=_sample(body),
            top_logprobs=body.logprobs,
        )  # fmt: skip
        sampling = await prompts.shaped(sampling, form)
        asks.append(Ask(ids, sampling, body.stops(), adapter, request_id, continues=True))
        echoes.append((prompt if isinstance(prompt, str) else prompts.decode(ids)) if body.echo else "")
    if len(asks) * body.n > 8:
        raise RequestError("at most 8 answers a request: fewer prompts or a smaller 'n'", param="n")
    return asks, [echo for echo in echoes for _ in range(body.n)]


def _prompts(prompt: str | Sequence[str] | Sequence[int] | Sequence[list[int]]) -> list[str | list[int]]:
    """Return the prompts of a body as a list of texts and id lists, whichever of the four it was."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    ids = [entry for entry in prompt if isinstance(entry, int)]
    return [ids] if ids else [entry for entry in prompt if not isinstance(entry, int)]


def _check_common(body: OpenAIFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' needs 'stream': true", param="stream_options")


def _sample(body: OpenAIFields) -> bool | None:
    """Several answers to one prompt are asked for to differ."""
    return True if body.n > 1 and body.temperature is None else None


async def _respond(
    answers: Answers, asks: Sequence[Ask], body: OpenAIFields, request: Request, form: Chat | Completion
) -> Response:
    request_id = request.state.request_id
    batch = answers.start(asks, n=body.n)
    head = {
        "id": f"{form.id_prefix}-{request_id}",
        "object": form.object,
        "created": int(time.time()),
        "model": asks[0].adapter or answers.served().name,
        "system_fingerprint": None,
    }
    if body.stream:
        events = _events(batch, {**head, "object": form.chunk_object}, form, include_usage=body.include_usage)
        return EventStream(events, close=batch.close, request_id=request_id)
    try:
        wholes = await unless_gone(request, batch.whole(), request_id=request_id)
    finally:
        batch.close()
    choices = [form.whole(index, whole) for index, whole in enumerate(wholes)]
    return JSONResponse({**head, "choices": choices, "usage": usage(batch)})


async def _events(
    batch: Batch, head: dict[str, Any], form: Chat | Completion, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    rest: dict[str, Any] = {"usage": None} if include_usage else {}
    for index in range(len(batch.answers)):
        for first in form.first(index):
            yield {**head, "choices": [first], **rest}
    async for index, piece in batch.pieces():
        for choice in form.chunks(index, piece):
            yield {**head, "choices": [choice], **rest}
    if include_usage:
        yield {**head, "choices": [], "usage": usage(batch)}


def usage(batch: Batch) -> dict[str, Any]:
    """Return OpenAI's token counts."""
    return {
        "prompt_tokens": batch.prompt_tokens,
        "completion_tokens": batch.new_tokens,
        "total_tokens": batch.prompt_tokens + batch.new_tokens,
        "prompt_tokens_details": {"cached_tokens": batch.cached_tokens},
    }
