"""The OpenAI routes: /v1/chat/completions, /v1/completions and /v1/models.

Knows OpenAI's JSON, nothing of how text is made (answers.py). Start at `_ask_chat` for what a request
means and choices.py for what an answer looks like.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import RequestError
from runtime.serving import structured_output
from runtime.serving.engine.protocol import Token
from runtime.serving.generation import Generated, GenerationRequest, Generations, Generator, TextChunk
from runtime.serving.http.schema import ChatCompletionBody, CompletionBody, OpenAIFields, ToolChoice
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone
from runtime.serving.tokenizer import AnswerLength, PromptTokenizer
from runtime.serving.tool_calls import Call, ToolStream, split


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The JSON of chat completions."""

    prompts: PromptTokenizer
    logprobs: bool
    tools: frozenset[str] = frozenset()
    calling: dict[int, ToolStream] = field(default_factory=dict)
    """Answers in which a call may hide, by their index."""
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, whole: Generated) -> dict[str, Any]:
        """Return one choice of a complete answer."""
        text, calls = split(whole.text, self.tools) if self.tools else (whole.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(whole.tokens),
            "finish_reason": "tool_calls" if calls else whole.finish,
        }

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that opens an answer: the role."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunks(self, index: int, piece: TextChunk) -> list[dict[str, Any]]:
        """Return the chunks of one piece: text, then how it ended in a chunk of its own."""
        text, finish, calls = piece.text, str(piece.finish or ""), list[Call]()
        if self.tools:
            stream = self.calling.setdefault(index, ToolStream(self.tools))
            text = stream.push(text)
            if finish:
                rest, calls = stream.finish()
                text, finish = text + rest, "tool_calls" if calls else finish
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        deltas: list[tuple[dict[str, Any], Any, str | None]] = []
        if text or logprobs:
            deltas.append(({"content": text}, logprobs, None))
        if calls:
            deltas.append(({"tool_calls": [call.as_json(i) for i, call in enumerate(calls)]}, None, None))
        if finish:
            deltas.append(({}, None, finish))
        return [
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            for delta, logprobs, reason in deltas
        ]

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **self._scored(token.id, token.logprob),
                "top_logprobs": [self._scored(other, logprob) for other, logprob in token.top],
            }
            for token in tokens
            if token.id is not None
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.prompts.token_text(token)
        # Part of a character has no text of its own; OpenAI's `bytes` is null where it is not known.
        known = list(text.encode()) if "\ufffd" not in text else None
        return {"token": text, "logprob": finite(logprob), "bytes": known}


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """The JSON of completions."""

    prompts: PromptTokenizer
    logprobs: int | None
    echoes: Sequence[str]
    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, index: int, whole: Generated) -> dict[str, Any]:
        """Return one choice of a complete answer."""
        text = self.echoes[index] + whole.text
        logprobs = self._logprobs(whole.tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": whole.finish}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that opens an answer: the prompt where `echo` asks for it."""
        text = self.echoes[index]
        return [{"index": index, "text": text, "logprobs": None, "finish_reason": None}] if text else []

    def chunks(self, index: int, piece: TextChunk) -> list[dict[str, Any]]:
        """Return the chunk of one piece."""
        if not piece.text and not piece.finish and not piece.tokens:
            return []
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return [{"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}]

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        texts = [self.prompts.token_text(token.id) for token in tokens if token.id is not None]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self.prompts.token_text(i): finite(p) for i, p in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


def finite(logprob: float | None) -> float:
    """Return a log probability that JSON can hold; -9999 stands for impossible, as it does at OpenAI."""
    return max(logprob, -9999.0) if logprob is not None else -9999.0


def router(answers: Generator) -> APIRouter:
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
        form = ChatFormat(answers.served().prompts, body.logprobs, tool_names(body))
        return await _respond(answers, [ask], body, request, form)

    @routes.post("/completions", responses=STREAMED, summary="Continue a text", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        asks, echoes = await _ask_texts(answers, body, request.state.request_id)
        form = CompletionFormat(answers.served().prompts, body.logprobs, echoes)
        return await _respond(answers, asks, body, request, form)

    return routes


def model_list(answers: Generator) -> list[dict[str, Any]]:
    """Return what is served as OpenAI's model objects, the base first; adapters name it as parent."""
    served = answers.served()
    base, *adapters = served.models()
    entry = {"object": "model", "created": served.created, "owned_by": "runtime"}
    context = served.prompts.context_tokens
    return [
        {"id": base, **entry, "root": base, "parent": None, "max_model_len": context},
        *({"id": name, **entry, "root": name, "parent": base, "max_model_len": context} for name in adapters),
    ]


async def _ask_chat(answers: Generator, body: ChatCompletionBody, request_id: str) -> GenerationRequest:
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
        extent = AnswerLength(body.max_completion_tokens, param="max_completion_tokens")
    else:
        extent = AnswerLength(body.max_tokens)
    sampling = prompts.sampling(
        body,
        prompt_tokens=len(ids),
        extent=extent,
        sample=_sample(body),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    form = structured_output.constraint_of(body) or _forced_call(body)
    return GenerationRequest(ids, await prompts.shaped(sampling, form), body.stops(), adapter, request_id)


def _forced_call(body: ChatCompletionBody) -> structured_output.Constraint | None:
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
    return structured_output.call_to(((tool.name, tool.parameters) for tool in tools), "tool_choice")


def tool_names(body: ChatCompletionBody) -> frozenset[str]:
    """Return the functions the model may call; none for `tool_choice` "none"."""
    if not body.tools or body.tool_choice == "none":
        return frozenset()
    if (other := next((tool.type for tool in body.tools if tool.type != "function"), None)) is not None:
        raise RequestError(f"tools of type '{other}' are not supported here", param="tools")
    return frozenset(tool.function.name for tool in body.tools)


async def _ask_texts(
    answers: Generator, body: CompletionBody, request_id: str
) -> tuple[list[GenerationRequest], list[str]]:
    """Return what to generate for each prompt, and the prompts' texts that `echo` puts first."""
    _check_common(body)
    if body.suffix:
        raise RequestError("'suffix' is not supported here", param="suffix")
    if body.best_of is not None and body.best_of != body.n:
        raise RequestError("'best_of' other than 'n' is not supported here", param="best_of")
    if body.echo and body.logprobs is not None:
        raise RequestError("'logprobs' of the prompt ('echo') are not supported here", param="logprobs")
    adapter = answers.adapter(body.model)
    form = structured_output.constraint_of(body)
    prompts = answers.served().prompts
    asks, echoes = [], []
    for prompt in _prompts(body.prompt):
        ids = await prompts.text(prompt) if isinstance(prompt, str) else prompts.ids(prompt)
        sampling = prompts.sampling(
            body, prompt_tokens=len(ids), extent=AnswerLength(body.max_tokens), sample=_sample(body),
            top_logprobs=body.logprobs,
        )  # fmt: skip
        sampling = await prompts.shaped(sampling, form)
        asks.append(GenerationRequest(ids, sampling, body.stops(), adapter, request_id, continues=True))
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
    answers: Generator,
    asks: Sequence[GenerationRequest],
    body: OpenAIFields,
    request: Request,
    form: ChatFormat | CompletionFormat,
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
    batch: Generations, head: dict[str, Any], form: ChatFormat | CompletionFormat, *, include_usage: bool
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


def usage(batch: Generations) -> dict[str, Any]:
    """Return OpenAI's token counts."""
    return {
        "prompt_tokens": batch.prompt_tokens,
        "completion_tokens": batch.new_tokens,
        "total_tokens": batch.prompt_tokens + batch.new_tokens,
        "prompt_tokens_details": {"cached_tokens": batch.cached_tokens},
    }
