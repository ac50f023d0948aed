"""One request's way through the engine, and its answer's way back as text.

The path of POST /chat: body (http/chat.py, http/schema.py) -> token ids (tokenizer.py) and `Sampling`
(http/parameters.py) -> `GenerationRequest` -> engine `Request` -> `Token`s -> parts in `AnswerChunk`s
(answer_text.py) -> JSON (http/chat.py) or events (http/sse.py). Here: admission, deadline, metrics. Does not
know any route's JSON. Start at `Generator.start`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

from runtime.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from runtime.metrics import ServingMetrics
from runtime.serving.adapter_sources.sources import AdapterSources
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.parts import CallStart, ContentDelta, ParsedAnswer, Part
from runtime.serving.answer_text import AnswerText, PromptEnd
from runtime.serving.detokenize import TAIL_TOKENS, StopRules
from runtime.serving.engine.protocol import Request, Sampling, Token
from runtime.serving.lifecycle import Lifecycle, ServedModel, adapter_name
from runtime.serving.rate_limits import Reservation
from runtime.serving.token_bytes import AnswerToken, AnswerTokens
from runtime.serving.tokenizer import PromptTokenizer
from runtime.serving.tokenizing import CALLER

log = logging.getLogger(__name__)

AnswerFinish = Literal["stop", "length", "tool_calls"]
"""Why an answer ended: by itself, at its longest, or by itself with calls in it."""


@dataclass(frozen=True, slots=True)
class TextRules:
    """What becomes text, and which text ends the answer."""

    stops: tuple[str, ...] = ()
    """Strings that end the answer, once it has the tokens that it must have."""
    includes_stop: bool = False
    """The stop string is part of the answer."""
    shows_special: bool = False
    """Special tokens are part of the text."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to answer, the same for every route."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    text: TextRules = TextRules()
    adapter: str | None = None
    request_id: str = ""
    continues_prompt: bool = False
    """The answer continues the prompt's text (no chat template): its first space counts."""
    form: AnswerForm = field(default_factory=AnswerForm)
    """How the answer's text is read; without a format, all of it is content."""


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """Parts to send; the last chunk says how the answer ended."""

    parts: tuple[Part, ...] = ()
    tokens: tuple[AnswerToken, ...] = ()
    """The tokens whose text is settled with this chunk, where the request wants their log probabilities."""
    finish: AnswerFinish | None = None
    stop: str = ""
    """The stop string that ended the answer."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens, in a chunk of their own, where the request wants their log probabilities."""

    @property
    def text(self) -> str:
        """The content among the parts."""
        return "".join(part.text for part in self.parts if isinstance(part, ContentDelta))


@dataclass(slots=True)
class GeneratedAnswer:
    """A complete answer."""

    parsed: ParsedAnswer = field(default_factory=ParsedAnswer)
    prompt: tuple[Token, ...] = ()
    tokens: list[AnswerToken] = field(default_factory=list)
    finish: AnswerFinish = "stop"
    stop: str = ""
    """The stop string that ended it."""

    @property
    def text(self) -> str:
        """The content."""
        return self.parsed.content


class Generation:
    """One answer in progress. Iterate `chunks` once, then call `close` in any case."""

    def __init__(
        self, served: ServedModel, request: GenerationRequest, *, metrics: ServingMetrics, deadline: float
    ) -> None:
        self.new_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens that the engine had in its cache; known with the first token."""
        self._arrived = time.monotonic()
        self._request = request
        self._metrics = metrics
        self._deadline = deadline
        self._engine = served.engine
        self._stack = ExitStack()
        self._tokens = served.engine.submit(
            Request(
                request.prompt_ids,
                request.sampling,
                adapter=request.adapter,
                id=request.request_id,
                client=CALLER.get().name,
            )
        )
        self._mark_running = self._stack.enter_context(
            metrics.adapter(request.adapter and adapter_name(request.adapter))
        )
        self._called = False
        self._text, self._answer_tokens = _texts(served.tokenizer, request)
        metrics.admitted(len(request.prompt_ids))

    async def chunks(self) -> AsyncIterator[AnswerChunk]:
        """Yield the answer chunk by chunk; the last has `finish` set.

        Raises DeadlineError, UnavailableError when the server shuts down, or the engine's own failure.
        """
        last_at = self._arrived
        async for token in self._tokens_until_deadline():
            if token.start is not None:
                self.cached_tokens = token.start.cached_tokens
                self._metrics.left_queue(token.start.queued_s)
                self._mark_running()
                if token.start.prompt:
                    yield AnswerChunk(prompt=token.start.prompt)
            if token.id is None:
                if token.finish_reason == "cancelled":
                    raise UnavailableError("the server is shutting down and cancelled this answer")
                parts, stopped = self._text.finish()
                chunk = self._with_end(self._chunk(None, parts, stopped=stopped), token)
                yield self._last_chunk(
                    chunk, "stop" if stopped or token.finish_reason == "stop" else "length"
                )
                return
            last_at = self._record_token(last_at)
            parts, stopped = self._text.push(token.id)
            chunk = self._chunk(token, parts, stopped=stopped)
            if stopped:
                yield self._last_chunk(chunk, "stop")
                return
            if chunk.parts or chunk.tokens:
                yield chunk
        raise UnavailableError("the engine ended this answer without a reason")

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts so far."""
        return self._text.reasoning_tokens

    def _chunk(self, token: Token | None, parts: list[Part], *, stopped: bool) -> AnswerChunk:
        """Return parts with the tokens that they complete, where those are wanted."""
        self._called = self._called or any(isinstance(part, CallStart) for part in parts)
        if self._answer_tokens is None:
            return AnswerChunk(tuple(parts))
        tokens = self._answer_tokens.push(token, self._text.decoded, sent=self._text.settled)
        return AnswerChunk(tuple(parts), tokens + self._answer_tokens.cut() if stopped else tokens)

    def _with_end(self, chunk: AnswerChunk, end: Token) -> AnswerChunk:
        """Return the last chunk with the stop id that ended the answer, where prompts are scored.

        Who scores texts counts on one token more than the prompt has (`max_tokens` 1), whichever it is.
        """
        if self._answer_tokens is None or not self._request.sampling.prompt_logprobs or end.stop_id is None:
            return chunk
        last = self._answer_tokens.end(replace(end, id=end.stop_id))
        return replace(chunk, tokens=(*chunk.tokens, last))

    async def complete(self) -> GeneratedAnswer:
        """Return the answer once it is complete."""
        answer = GeneratedAnswer()
        async for chunk in self.chunks():
            answer.parsed.add(chunk.parts)
            answer.prompt += chunk.prompt
            answer.tokens += chunk.tokens
            answer.finish, answer.stop = chunk.finish or "stop", chunk.stop
        return answer

    def close(self) -> None:
        """Stop the engine's work on this answer, if it still goes on."""
        self._engine.cancel(self._request.request_id)
        self._stack.close()

    async def _tokens_until_deadline(self) -> AsyncIterator[Token]:
        tokens = aiter(self._tokens)
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    token = await anext(tokens)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineError(
                    f"no complete answer in time after {self.new_tokens} tokens; ask for fewer tokens"
                ) from None
            yield token

    def _record_token(self, last_at: float) -> float:
        """Count and time one token; `last_at` is when the one before it came."""
        now = time.monotonic()
        if self.new_tokens == 0:
            self._metrics.first_token(now - self._arrived, prompt_tokens=len(self._request.prompt_ids))
        else:
            self._metrics.next_token(now - last_at)
        self.new_tokens += 1
        return now

    def _last_chunk(self, chunk: AnswerChunk, finish: AnswerFinish) -> AnswerChunk:
        seconds = time.monotonic() - self._arrived
        self._metrics.finished(finish, seconds=seconds, tokens=self.new_tokens)
        log.info(
            "Answered %s: %s prompt and %s new tokens in %.2f s (%s)",
            self._request.request_id,
            len(self._request.prompt_ids),
            self.new_tokens,
            seconds,
            finish,
            extra={
                "fields": {
                    "request_id": self._request.request_id,
                    "adapter": self._request.adapter,
                    "prompt_tokens": len(self._request.prompt_ids),
                    "new_tokens": self.new_tokens,
                    "seconds": round(seconds, 3),
                    "finish": finish,
                }
            },
        )
        finish = "tool_calls" if finish == "stop" and self._called else finish
        return replace(chunk, finish=finish, stop=self._text.stop)


def _texts(tokenizer: PromptTokenizer, request: GenerationRequest) -> tuple[AnswerText, AnswerTokens | None]:
    """Return what makes parts of an answer's tokens, and what says which token is which part of its text."""
    wanted, ids = request.text, request.prompt_ids
    text = AnswerText(
        tokenizer.decode_verbatim if wanted.shows_special else tokenizer.decode,
        request.form,
        stops=StopRules(
            wanted.stops, included=wanted.includes_stop, min_tokens=request.sampling.min_new_tokens
        ),
        special={} if wanted.shows_special else tokenizer.special,
        prompt=PromptEnd(
            tokens=ids[-TAIL_TOKENS:] if request.continues_prompt else (),
            text="" if request.form.plain else tokenizer.end_of(ids),
        ),
    )
    tokens = None
    if request.sampling.top_logprobs is not None:
        left_out = () if wanted.shows_special else tokenizer.special.values()
        tokens = AnswerTokens(tokenizer.token_bytes, frozenset(left_out))
    return text, tokens


class GenerationGroup:
    """The answers to one HTTP request (`n` of them, or several prompts), all admitted or none."""

    def __init__(self, generations: Sequence[Generation], prompt_tokens: int, stack: ExitStack) -> None:
        self.generations = generations
        self.prompt_tokens = prompt_tokens
        self._stack = stack

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, over all answers."""
        return sum(generation.new_tokens for generation in self.generations)

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that are thoughts."""
        return sum(generation.reasoning_tokens for generation in self.generations)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the engine's cache, of the answer that had fewest."""
        return min(generation.cached_tokens for generation in self.generations)

    async def complete(self) -> list[GeneratedAnswer]:
        """Return all answers once they are complete; the first failure cancels the rest."""
        try:
            async with asyncio.TaskGroup() as running:
                tasks = [running.create_task(generation.complete()) for generation in self.generations]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def chunks(self) -> AsyncIterator[tuple[int, AnswerChunk]]:
        """Yield (index of the answer, chunk) in the order in which they come."""
        if len(self.generations) == 1:
            async for chunk in self.generations[0].chunks():
                yield 0, chunk
            return
        streams = [generation.chunks() for generation in self.generations]
        pending = {asyncio.ensure_future(_next(stream)): i for i, stream in enumerate(streams)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, chunk = pending.pop(task), task.result()
                    if chunk.finish is None:
                        pending[asyncio.ensure_future(_next(streams[index]))] = index
                    yield index, chunk
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def close(self) -> None:
        """Free what the answers still hold; call it once, in any case."""
        self._stack.close()


async def _next(chunks: AsyncIterator[AnswerChunk]) -> AnswerChunk:
    return await anext(chunks)


class Generator:
    """Starts answers: what all routes share."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        metrics: ServingMetrics,
        *,
        timeout_s: float,
        sources: AdapterSources | None = None,
    ) -> None:
        """`sources` are where adapters are looked for that are not in memory."""
        self.sources, self.metrics = sources, metrics
        self._lifecycle = lifecycle
        self._timeout_s = timeout_s

    def served(self) -> ServedModel:
        """Return what is served; UnavailableError while loading."""
        return self._lifecycle.served()

    async def adapter_for(self, model: str | None, *, param: str = "model") -> str | None:
        """Return the adapter that `model` names, as the engine calls it; None for the base model.

        One that is not in memory is loaded from a source, and stays until the request is answered.
        UnknownModelError for any other name; what else is raised says `AdapterSources.lease`.
        """
        served = self.served()
        if model is None or model == served.name or model in served.aliases:
            return served.default_adapter
        if model in served.engine.stats().adapters and adapter_name(model) == model:
            return model
        if self.sources is not None and self.sources.references(model):
            return await self.sources.lease(served, model, param=param)
        raise self.unknown(model, param=param)

    def adapter_key(self, name: str) -> str:
        """Return what the engine calls the adapter that /v1/models lists as `name`."""
        return (self.sources.key(name) if self.sources is not None else None) or name

    def unknown(self, model: str, *, param: str = "model") -> UnknownModelError:
        """Return the failure of a request for a model that is not served."""
        listed = ", ".join(self.served().models())
        return UnknownModelError(
            f"model '{model}' is not served here; GET /v1/models lists {listed}",
            param=param,
            code="model_not_found",
        )

    def check_count(self, prompts: int, *, n: int, param: str) -> None:
        """Raise RequestError where `n` answers to each of so many prompts are more than the engine takes."""
        most = self.served().engine.stats().max_requests
        if most and prompts * n > most:
            raise RequestError(
                f"{prompts} prompts with n {n} are {prompts * n} answers, and this server takes {most} at a "
                f"time: send at most {most // n} prompts in one request",
                param=param,
            )

    def start(self, requests: Sequence[GenerationRequest], *, n: int = 1) -> GenerationGroup:
        """Queue `n` answers to each of `requests`: all of them, or none and OverloadedError.

        RateLimitError where the key has not the tokens that they may use. The caller closes the group when it
        is answered or given up.
        """
        served = self.served()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        expanded = _one_per_answer(requests, n)
        _check_room(served, len(expanded))
        prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        new_tokens = sum(request.sampling.max_new_tokens for request in expanded)
        with ExitStack() as stack:
            generations: list[Generation] = []
            if (budget := CALLER.get().budget) is not None:
                stack.push(_settling(budget.reserve(prompt_tokens, new_tokens), generations))
            for request in expanded:
                generation = Generation(served, request, metrics=self.metrics, deadline=deadline)
                stack.callback(generation.close)
                generations.append(generation)
            return GenerationGroup(generations, prompt_tokens, stack.pop_all())
        raise AssertionError("an exit stack swallows nothing")


def _check_room(served: ServedModel, answers: int) -> None:
    """Raise OverloadedError before the first of several `answers` is queued where not all of them can be."""
    stats = served.engine.stats()
    taken = stats.running + stats.waiting
    if answers > 1 and stats.max_requests and taken + answers > stats.max_requests:
        raise OverloadedError(
            f"{taken} requests are in progress, and with these {answers} they were more than the "
            f"{stats.max_requests} that this server takes at a time; try again shortly"
        )


def _settling(
    reservation: Reservation, generations: Sequence[Generation]
) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """Return what an exit stack calls at the end: counts what was used, or nothing if it was not begun."""

    def settle(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            reservation.settle(sum(generation.new_tokens for generation in generations))
        else:  # while the answers were queued
            reservation.cancel()

    return settle


def _one_per_answer(requests: Sequence[GenerationRequest], n: int) -> list[GenerationRequest]:
    """Return one request per answer, each with an id of its own; `n` answers to a prompt differ by seed."""
    expanded: list[GenerationRequest] = []
    for request in requests:
        for choice in range(n):
            sampling = request.sampling
            if sampling.seed is not None and choice:
                sampling = replace(sampling, seed=sampling.seed + choice)
            number = len(expanded)
            several = len(requests) * n > 1
            request_id = f"{request.request_id}-{number}" if several else request.request_id
            expanded.append(replace(request, sampling=sampling, request_id=request_id))
    return expanded
