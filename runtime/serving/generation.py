"""One request's way through the engine, and its answer's way back as text.

The path of POST /chat: body (http/chat.py, http/schema.py) -> token ids (tokenizer.py) and `Sampling`
(http/parameters.py) -> `GenerationRequest` -> engine `Request` -> `Token`s -> `TextChunk`s (detokenize.py)
-> JSON (http/chat.py) or events (http/sse.py). Here: admission, deadline, stop strings, metrics. Does not
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

from runtime.errors import DeadlineError, UnavailableError, UnknownModelError
from runtime.metrics import ServingMetrics
from runtime.serving.detokenize import TAIL_TOKENS, StopRules, TextStream
from runtime.serving.engine.protocol import Request, Sampling, Token
from runtime.serving.lifecycle import Lifecycle, ServedModel
from runtime.serving.rate_limits import Reservation
from runtime.serving.token_bytes import AnswerToken, AnswerTokens
from runtime.serving.tokenizer import PromptTokenizer
from runtime.serving.tokenizing import CALLER

log = logging.getLogger(__name__)

TextFinish = Literal["stop", "length"]


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


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Text to send; the last chunk says how the answer ended."""

    text: str
    tokens: tuple[AnswerToken, ...] = ()
    """The tokens whose text ends in this chunk, where the request wants their log probabilities."""
    finish: TextFinish | None = None


@dataclass(slots=True)
class GeneratedText:
    """A complete answer."""

    text: str = ""
    tokens: list[AnswerToken] = field(default_factory=list)
    finish: TextFinish = "stop"


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
        self._mark_running = self._stack.enter_context(metrics.adapter(request.adapter))
        self._text, self._answer_tokens = _texts(served.tokenizer, request)
        metrics.admitted(len(request.prompt_ids))

    async def chunks(self) -> AsyncIterator[TextChunk]:
        """Yield the answer chunk by chunk; the last has `finish` set.

        Raises DeadlineError, UnavailableError when the server shuts down, or the engine's own failure.
        """
        last_at = self._arrived
        async for token in self._tokens_until_deadline():
            if token.start is not None:
                self.cached_tokens = token.start.cached_tokens
                self._metrics.left_queue(token.start.queued_s)
                self._mark_running()
            if token.id is None:
                if token.finish_reason == "cancelled":
                    raise UnavailableError("the server is shutting down and cancelled this answer")
                text, stopped = self._text.finish()
                tokens = self._sent(None, text, stopped=stopped)
                stopped = stopped or token.finish_reason == "stop"
                yield self._last_chunk(text, tokens, "stop" if stopped else "length")
                return
            last_at = self._record_token(last_at)
            text, stopped = self._text.push(token.id)
            tokens = self._sent(token, text, stopped=stopped)
            if stopped:
                yield self._last_chunk(text, tokens, "stop")
                return
            if text:
                yield TextChunk(text, tokens)
        raise UnavailableError("the engine ended this answer without a reason")

    def _sent(self, token: Token | None, text: str, *, stopped: bool) -> tuple[AnswerToken, ...]:
        """Return the tokens that `text` completes, where they are wanted."""
        if self._answer_tokens is None:
            return ()
        tokens = self._answer_tokens.push(token, self._text.decoded, sent=len(text))
        return tokens + self._answer_tokens.cut() if stopped else tokens

    async def complete(self) -> GeneratedText:
        """Return the answer once it is complete."""
        answer = GeneratedText()
        async for chunk in self.chunks():
            answer.text += chunk.text
            answer.tokens += chunk.tokens
            answer.finish = chunk.finish or "stop"
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

    def _last_chunk(self, text: str, tokens: tuple[AnswerToken, ...], finish: TextFinish) -> TextChunk:
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
        return TextChunk(text, tokens, finish)


def _texts(tokenizer: PromptTokenizer, request: GenerationRequest) -> tuple[TextStream, AnswerTokens | None]:
    """Return what makes text of an answer's tokens, and what says which token is which part of it."""
    wanted = request.text
    rules = StopRules(
        wanted.stops,
        included=wanted.includes_stop,
        min_tokens=request.sampling.min_new_tokens,
        special={} if wanted.shows_special else tokenizer.special_within(wanted.stops),
    )
    tail = request.prompt_ids[-TAIL_TOKENS:] if request.continues_prompt else ()
    decode = tokenizer.decode_verbatim if wanted.shows_special else tokenizer.decode
    tokens = None
    if request.sampling.top_logprobs is not None:
        left_out = () if wanted.shows_special else tokenizer.special.values()
        tokens = AnswerTokens(tokenizer.token_bytes, frozenset(left_out))
    return TextStream(decode, stops=rules, tail=tail), tokens


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
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the engine's cache, of the answer that had fewest."""
        return min(generation.cached_tokens for generation in self.generations)

    async def complete(self) -> list[GeneratedText]:
        """Return all answers once they are complete; the first failure cancels the rest."""
        try:
            async with asyncio.TaskGroup() as running:
                tasks = [running.create_task(generation.complete()) for generation in self.generations]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def chunks(self) -> AsyncIterator[tuple[int, TextChunk]]:
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


async def _next(chunks: AsyncIterator[TextChunk]) -> TextChunk:
    return await anext(chunks)


class Generator:
    """Starts answers: what all routes share."""

    def __init__(self, lifecycle: Lifecycle, metrics: ServingMetrics, *, timeout_s: float) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._timeout_s = timeout_s

    def served(self) -> ServedModel:
        """Return what is served; UnavailableError while loading."""
        return self._lifecycle.served()

    def adapter_for(self, model: str | None, *, param: str = "model") -> str | None:
        """Return the adapter that `model` names, None for the base model; UnknownModelError otherwise."""
        served = self.served()
        if model is None or model == served.name or model in served.aliases:
            return served.default_adapter
        if model not in served.engine.stats().adapters:
            raise UnknownModelError(
                f"model '{model}' is not served here; GET /v1/models lists {', '.join(served.models())}",
                param=param,
                code="model_not_found",
            )
        return model

    def start(self, requests: Sequence[GenerationRequest], *, n: int = 1) -> GenerationGroup:
        """Queue `n` answers to each of `requests`: all of them, or none and OverloadedError.

        RateLimitError where the key has not the tokens that they may use. The caller closes the group when it
        is answered or given up.
        """
        served = self.served()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        expanded = _one_per_answer(requests, n)
        prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        new_tokens = sum(request.sampling.max_new_tokens for request in expanded)
        with ExitStack() as stack:
            generations: list[Generation] = []
            if (budget := CALLER.get().budget) is not None:
                stack.push(_settling(budget.reserve(prompt_tokens, new_tokens), generations))
            for request in expanded:
                generation = Generation(served, request, metrics=self._metrics, deadline=deadline)
                stack.callback(generation.close)
                generations.append(generation)
            return GenerationGroup(generations, prompt_tokens, stack.pop_all())
        raise AssertionError("an exit stack swallows nothing")


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
