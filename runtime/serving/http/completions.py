"""/v1/completions: prompts to continue, or only to score (`echo` with `logprobs`), in OpenAI's JSON.

Answers are numbered as at OpenAI: the `n` of the first prompt, then those of the second. Knows nothing of how
text is generated. Start at `router`, then `_completion_requests` and `CompletionFormat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Token
from runtime.serving.generation import AnswerChunk, GeneratedAnswer, GenerationRequest, Generator
from runtime.serving.http import parameters
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.constraint_fields import constrained, constraint
from runtime.serving.http.logprobs import Logprobs
from runtime.serving.http.openai import check_common, respond, samples
from runtime.serving.http.schema import CompletionBody
from runtime.serving.http.sse import STREAMED
from runtime.serving.token_bytes import AnswerToken, prompt_tokens
from runtime.serving.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """The JSON of completions."""

    tokenizer: PromptTokenizer
    logprobs: int | None
    echoes: Sequence[str]
    """By answer: the text that `echo` puts first."""
    id_prefix: ClassVar[str] = "cmpl"
    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def choice(self, index: int, answer: GeneratedAnswer) -> dict[str, Any]:
        """Return one complete answer."""
        tokens = [*self._prompt_tokens(index, answer.prompt), *self._answer_tokens(index, answer.tokens)]
        return self._event(index, self.echoes[index] + answer.text, tokens, answer.finish)

    def opening_events(self, index: int) -> list[dict[str, Any]]:
        """Return the events that open an answer: the prompt where `echo` asks for it without its tokens."""
        text = self.echoes[index]
        return [self._event(index, text)] if text and self.logprobs is None else []

    def events(self, index: int, chunk: AnswerChunk) -> list[dict[str, Any]]:
        """Return the event of one chunk, none for an empty one; the first is the prompt with its tokens."""
        if chunk.prompt:
            return [self._event(index, self.echoes[index], self._prompt_tokens(index, chunk.prompt))]
        if not chunk.text and not chunk.finish and not chunk.tokens:
            return []
        return [self._event(index, chunk.text, self._answer_tokens(index, chunk.tokens), chunk.finish)]

    def _event(
        self, index: int, text: str, tokens: Sequence[AnswerToken] = (), finish: str | None = None
    ) -> dict[str, Any]:
        wanted = self.logprobs is not None and (tokens or finish is not None)
        logprobs = Logprobs(self.tokenizer).completion(tokens) if wanted else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _prompt_tokens(self, index: int, tokens: Sequence[Token]) -> Sequence[AnswerToken]:
        text, special = self.echoes[index], self.tokenizer.special.values()
        return prompt_tokens(tokens, text, self.tokenizer.token_bytes, special=frozenset(special))

    def _answer_tokens(self, index: int, tokens: Sequence[AnswerToken]) -> Sequence[AnswerToken]:
        before = len(self.echoes[index])
        return [replace(sent, offset=before + sent.offset) for sent in tokens]


def router(generator: Generator) -> APIRouter:
    """Return the route."""
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=BodyRoute)

    @routes.post(
        "/completions", responses=STREAMED, summary="Continue texts, or score them", response_model=None
    )
    async def completions(body: CompletionBody, request: Request) -> Response:
        requests, echoes = await _completion_requests(generator, body, request)
        json_format = CompletionFormat(generator.served().tokenizer, body.logprobs, echoes)
        return await respond(generator, requests, body, request, json_format)

    return routes


async def _completion_requests(
    generator: Generator, body: CompletionBody, request: Request
) -> tuple[list[GenerationRequest], list[str]]:
    """Return what to generate for each prompt, and per answer the text that `echo` puts first."""
    _check(body)
    prompts = _prompts(body.prompt)
    generator.check_count(len(prompts), n=body.n, param="prompt")
    adapter = await generator.adapter_for(body.model)
    asked, text_rules = constraint(body), parameters.text_rules(body)
    length = parameters.AnswerLength(body.max_tokens)
    tokenizer = generator.served().tokenizer
    found = [
        await tokenizer.prompt_from_text(prompt, special=body.add_special_tokens)
        if isinstance(prompt, str)
        else tokenizer.prompt_from_ids(prompt)
        for prompt in prompts
    ]
    most = [parameters.max_new_tokens(length, tokenizer, prompt_tokens=len(ids)) for ids in found]
    sampling = await parameters.sampling(
        body, tokenizer, max_new_tokens=min(most), sample=samples(body), top_logprobs=body.logprobs
    )
    sampling = await constrained(request, tokenizer, sampling, asked)
    sampling = replace(sampling, prompt_logprobs=body.echo and body.logprobs is not None)
    requests, echoes = [], []
    for prompt, ids, new_tokens in zip(prompts, found, most, strict=True):
        own = replace(sampling, max_new_tokens=new_tokens)
        request_id = request.state.request_id
        requests.append(GenerationRequest(ids, own, text_rules, adapter, request_id, continues_prompt=True))
        text = "" if not body.echo else prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        echoes += [text] * body.n
    return requests, echoes


def _check(body: CompletionBody) -> None:
    check_common(body)
    if body.suffix:
        raise RequestError("'suffix' is not supported here", param="suffix")
    if body.best_of is not None and body.best_of != body.n:
        raise RequestError("'best_of' other than 'n' is not supported here", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(
            "'max_tokens' 0 answers nothing: send 'echo': true to have the prompt scored, or at least 1",
            param="max_tokens",
        )


def _prompts(prompt: str | Sequence[str] | Sequence[int] | Sequence[list[int]]) -> list[str | list[int]]:
    """Return the prompts of a body as a list of texts and lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    ids = [entry for entry in prompt if isinstance(entry, int)]
    return [ids] if ids else [entry for entry in prompt if not isinstance(entry, int)]
