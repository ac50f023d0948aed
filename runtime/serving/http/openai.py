"""The OpenAI routes /v1/chat/completions and /v1/models, and what they share with /v1/completions.

Knows OpenAI's JSON, nothing of how text is generated (runtime/serving/generation.py). Start at
`chat_request` for what a request means and at `ChatFormat` for what an answer looks like.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import RequestError
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.grammars import ForcedCalls, spelled
from runtime.serving.answer_parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ParsedCall,
    Part,
    ReasoningDelta,
)
from runtime.serving.engine.protocol import Constraint
from runtime.serving.generation import (
    AnswerChunk,
    GeneratedAnswer,
    GenerationGroup,
    GenerationRequest,
    Generator,
)
from runtime.serving.http import parameters
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.constraint_fields import constrained, constraint
from runtime.serving.http.logprobs import Logprobs
from runtime.serving.http.messages import turns_of
from runtime.serving.http.schema import (
    OWN_WORDING,
    ChatCompletionBody,
    OpenAIFields,
    Wording,
)
from runtime.serving.http.sse import STREAMED, EventStream, unless_gone
from runtime.serving.http.template_fields import template_options
from runtime.serving.http.tool_fields import AllowedToolChoice, callable_tools, forced_call, shown_tools
from runtime.serving.token_bytes import AnswerToken
from runtime.serving.tokenizer import PromptTokenizer


class AnswerFormat(Protocol):
    """The JSON of a route's answers."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def choice(self, index: int, answer: GeneratedAnswer) -> dict[str, Any]:
        """Return one complete answer."""
        ...

    def opening_events(self, index: int) -> list[dict[str, Any]]:
        """Return the events that open an answer."""
        ...

    def events(self, index: int, chunk: AnswerChunk) -> list[dict[str, Any]]:
        """Return the events of one chunk."""
        ...


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The JSON of chat completions."""

    tokenizer: PromptTokenizer
    logprobs: bool
    shows_reasoning: bool = True
    one_function: bool = False
    """Answer in the older form, which has room for one call: the request had `functions`."""
    id_prefix: ClassVar[str] = "chatcmpl"
    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def choice(self, index: int, answer: GeneratedAnswer) -> dict[str, Any]:
        """Return one complete answer."""
        parsed = answer.parsed
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
        if parsed.reasoning and self.shows_reasoning:
            message |= _reasoning(parsed.reasoning)
        if parsed.calls:
            message |= {"content": parsed.content or None, **self._called(parsed.calls)}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": self._reason(answer.finish),
        }

    def _reason(self, finish: str) -> str:
        return "function_call" if self.one_function and finish == "tool_calls" else finish

    def _called(self, calls: Sequence[ParsedCall]) -> dict[str, Any]:
        if self.one_function:
            return {"function_call": {"name": calls[0].name, "arguments": calls[0].arguments}}
        return {"tool_calls": [_call(call.name, call.arguments, id=call.id) for call in calls]}

    def opening_events(self, index: int) -> list[dict[str, Any]]:
        """Return the events that open an answer: the role."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def events(self, index: int, chunk: AnswerChunk) -> list[dict[str, Any]]:
        """Return the events of one chunk: its parts, and how the answer ended, each on its own."""
        logprobs = self._logprobs(chunk.tokens) if chunk.tokens else None
        deltas = [delta for part in chunk.parts if (delta := self._delta(part)) is not None]
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        events: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if events:
            events[0]["logprobs"] = logprobs
        if chunk.finish is not None:
            reason = self._reason(chunk.finish)
            events.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return events

    def _delta(self, part: Part) -> dict[str, Any] | None:
        """Return what a part adds to the message, None for what adds nothing to it."""
        match part:
            case ContentDelta(text):
                return {"content": text}
            case ReasoningDelta(text):
                return _reasoning(text) if self.shows_reasoning else None
            case CallStart(index, call_id, name):
                if self.one_function:
                    return {"function_call": {"name": name, "arguments": ""}}
                return {"tool_calls": [{"index": index, **_call(name, "", id=call_id)}]}
            case CallArguments(index, text):
                if self.one_function:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallEnd():
                return None

    def _logprobs(self, tokens: Sequence[AnswerToken]) -> dict[str, Any] | None:
        return {"content": Logprobs(self.tokenizer).chat(tokens), "refusal": None} if self.logprobs else None


def _reasoning(text: str) -> dict[str, Any]:
    """Return a thought by the two names that clients know."""
    return {"reasoning_content": text, "reasoning": text}


def _call(name: str, arguments: str, *, id: str) -> dict[str, Any]:  # noqa: A002 - OpenAI's name
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def router(generator: Generator) -> APIRouter:
    """Return the /v1 routes for text."""
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=BodyRoute)

    @routes.get("/models", summary="The base model and its adapters", response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": model_list(generator)})

    @routes.get("/models/{name:path}", summary="One model", response_model=None)
    async def model(name: str) -> Response:
        found = next((entry for entry in model_list(generator) if entry["id"] == name), None)
        if found is None:
            raise generator.unknown(name)
        return JSONResponse(found)

    @routes.post(
        "/chat/completions", responses=STREAMED, summary="Answer a conversation", response_model=None
    )
    async def chat_completions(body: ChatCompletionBody, request: Request) -> Response:
        requests = [await chat_request(generator, body, request)]
        json_format = ChatFormat(
            generator.served().tokenizer,
            body.logprobs,
            shows_reasoning=body.include_reasoning is not False,
            one_function=bool(body.functions),
        )
        return await respond(generator, requests, body, request, json_format)

    return routes


def model_list(generator: Generator) -> list[dict[str, Any]]:
    """Return what is served as OpenAI's model objects, the base first; adapters name it as parent."""
    served = generator.served()
    entry = {"object": "model", "created": served.created, "owned_by": "runtime"}
    context = served.tokenizer.context_tokens
    bases = (served.name, *served.aliases)
    base_digest = served.digest.value if served.digest else None
    found = []
    for name in served.models():
        is_base = name in bases
        digest = base_digest if is_base else served.adapter_digests.get(generator.adapter_key(name))
        lineage = {"root": served.name if is_base else name, "parent": None if is_base else served.name}
        # of the weights, once it is known; no field of OpenAI's, which clients ignore
        stated = {"weights_sha256": digest} if digest else {}
        found.append({"id": name, **entry, **lineage, "max_model_len": context, **stated})
    return found


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a conversation is for one model."""

    ids: tuple[int, ...]
    adapter: str | None
    tokenizer: PromptTokenizer
    continues_last: bool
    """The answer goes on where the last message ends."""


async def chat_prompt(
    generator: Generator,
    body: ChatCompletionBody,
    wording: Wording = OWN_WORDING,
) -> ChatPrompt:
    """Return the prompt of a conversation for the model that it names."""
    adapter = await generator.adapter_for(body.model)
    tokenizer = generator.served().tokenizer_for(adapter)
    options = template_options(body, tokenizer, shown_tools(body, generator.served(), adapter))
    turns = turns_of(
        body.messages, tokenizer.features_for(options), param=wording.messages, places=wording.places
    )
    ids = await tokenizer.prompt_from_chat(turns, options=options, param=wording.messages)
    return ChatPrompt(ids, adapter, tokenizer, options.continues_last)


async def chat_request(
    generator: Generator,
    body: ChatCompletionBody,
    request: Request,
    wording: Wording = OWN_WORDING,
) -> GenerationRequest:
    """Return what to generate for a conversation, which other routes put in OpenAI's words too."""
    check_common(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    asked, forced = _constraint(body, wording.format)
    prompt = await chat_prompt(generator, body, wording)
    tokenizer, ids = prompt.tokenizer, prompt.ids
    form = _form(generator, body, prompt.adapter)
    if body.max_completion_tokens is not None:
        length = parameters.AnswerLength(body.max_completion_tokens, param="max_completion_tokens")
    else:
        length = parameters.AnswerLength(body.max_tokens, param=wording.length)
    sampling = await parameters.sampling(
        body,
        tokenizer,
        max_new_tokens=parameters.max_new_tokens(length, tokenizer, prompt_tokens=len(ids)),
        sample=samples(body),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    asked = spelled(form, asked, forced, prompt=tokenizer.end_of(ids), special=tokenizer.special)
    sampling = await constrained(request, tokenizer, sampling, asked)
    request_id = request.state.request_id
    return GenerationRequest(
        ids,
        sampling,
        parameters.text_rules(body),
        prompt.adapter,
        request_id,
        continues_prompt=prompt.continues_last,
        form=form,
    )


def _form(generator: Generator, body: ChatCompletionBody, adapter: str | None) -> AnswerForm:
    """Return how the answer is read: in the model's format, with calls to the tools of the request."""
    served, one_call = generator.served(), not body.parallel_tool_calls or bool(body.functions)
    form = served.form_for(adapter)
    if body.include_reasoning is False and served.reasoning_parser and not (form.thoughts or form.harmony):
        raise RequestError(
            f"'include_reasoning' is not supported here: reasoning in the form of "
            f"'{served.reasoning_parser}' is not known, and stays in the text",
            param="include_reasoning",
        )
    only_tools = isinstance(body.tool_choice, AllowedToolChoice)
    return replace(form, tools=callable_tools(body), only_tools=only_tools, one_call=one_call)


def _constraint(body: ChatCompletionBody, format_param: str) -> tuple[Constraint | None, ForcedCalls | None]:
    """Return what the answer must match, or the calls that it must consist of.

    A call that is forced has no text that a format is for.
    """
    asked = constraint(body, format_param=format_param)
    forced = forced_call(
        body, several=body.parallel_tool_calls and "parallel_tool_calls" in body.model_fields_set
    )
    if asked is not None and forced is not None and asked.param != format_param:
        raise RequestError(f"'{forced.param}' and '{asked.param}' exclude each other", param=asked.param)
    return (None if forced else asked), forced


def check_common(body: OpenAIFields) -> None:
    """Raise RequestError for fields that do not go together."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' needs 'stream': true", param="stream_options")


def samples(body: OpenAIFields) -> bool | None:
    """Several answers to one prompt are meant to differ, so they are sampled."""
    return True if body.n > 1 and body.temperature is None else None


async def respond(
    generator: Generator,
    requests: Sequence[GenerationRequest],
    body: OpenAIFields,
    request: Request,
    json_format: AnswerFormat,
) -> Response:
    """Answer `requests` with JSON or a stream of events."""
    request_id = request.state.request_id
    group = generator.start(requests, n=body.n)
    head = {
        "id": f"{json_format.id_prefix}-{request_id}",
        "object": json_format.object,
        "created": int(time.time()),
        "model": generator.served().model_name(requests[0].adapter),
        "system_fingerprint": None,
    }
    if body.stream:
        head["object"] = json_format.chunk_object
        events = _events(group, head, json_format, include_usage=body.include_usage)
        return EventStream(events, close=group.close, request_id=request_id)
    try:
        answers = await unless_gone(request, group.complete(), request_id=request_id)
    finally:
        group.close()
    choices = [json_format.choice(index, answer) for index, answer in enumerate(answers)]
    return JSONResponse({**head, "choices": choices, "usage": usage(group)})


async def _events(
    group: GenerationGroup,
    head: dict[str, Any],
    json_format: AnswerFormat,
    *,
    include_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    tail: dict[str, Any] = {"usage": None} if include_usage else {}
    for index in range(len(group.generations)):
        for choice in json_format.opening_events(index):
            yield {**head, "choices": [choice], **tail}
    async for index, chunk in group.chunks():
        for choice in json_format.events(index, chunk):
            yield {**head, "choices": [choice], **tail}
    if include_usage:
        yield {**head, "choices": [], "usage": usage(group)}


def usage(group: GenerationGroup) -> dict[str, Any]:
    """Return OpenAI's token counts."""
    return {
        "prompt_tokens": group.prompt_tokens,
        "completion_tokens": group.new_tokens,
        "total_tokens": group.prompt_tokens + group.new_tokens,
        "prompt_tokens_details": {"cached_tokens": group.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": group.reasoning_tokens},
    }
