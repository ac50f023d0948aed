"""One request's way through the engine, and its answer's way back as text.

Between the routes (chat.py, openai.py) and the engine: admits, decodes, finds stop strings, keeps the
deadline, counts. Does not know any route's JSON. Start at `Generator.start`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from runtime.errors import DeadlineError, UnavailableError, UnknownModelError
from runtime.metrics import ServingMetrics
from runtime.serving.detokenize import TAIL_TOKENS, TextStream
from runtime.serving.engine.protocol import Request, Sampling, Token
from runtime.serving.lifecycle import Lifecycle, ServedModel

log = logging.getLogger(__name__)

Finish = Literal["stop", "length"]

GREEDY = Sampling(max_new_tokens=1)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is to be generated, whichever route asked."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    adapter: str | None = None
    request_id: str = ""
    continues: bool = False
    """The answer continues the prompt's text (no chat template): its first space counts."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Text to show, and the tokens that came with it; the last piece says how the answer ended."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


@dataclass(slots=True)
class Generated:
    """An answer collected to its end."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish = "stop"


class Generation:
    """One answer under way. Iterate `pieces` once, then call `close`, whatever happened."""

    def __init__(
        self, served: ServedModel, ask: GenerationRequest, *, metrics: ServingMetrics, deadline: float
    ) -> None:
        self.new_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens that the engine found in its cache; known with the first token."""
        self._arrived = time.monotonic()
        self._ask = ask
        self._metrics = metrics
        self._deadline = deadline
        self._engine = served.engine
        self._stack = ExitStack()
        self._tokens = served.engine.submit(
            Request(ask.prompt_ids, ask.sampling, adapter=ask.adapter, id=ask.request_id)
        )
        self._started = self._stack.enter_context(metrics.adapter(ask.adapter))
        tail = ask.prompt_ids[-TAIL_TOKENS:] if ask.continues else ()
        self._text = TextStream(served.prompts.decode, stops=ask.stops, tail=tail)
        metrics.admitted(len(ask.prompt_ids))

    async def pieces(self) -> AsyncIterator[TextChunk]:
        """Yield the answer piece by piece; the last has `finish` set.

        Raises DeadlineError, UnavailableError when the server gives the answer up, or what the engine
        failed with.
        """
        waiting: list[Token] = []  # tokens whose text is not out yet
        at = self._arrived
        async for token in self._in_time():
            if token.start is not None:
                self.cached_tokens = token.start.cached_tokens
                self._metrics.got_row(token.start.queued_s)
                self._started()
            if token.id is None:
                if token.finish_reason == "cancelled":
                    raise UnavailableError("the server is shutting down and gave this answer up")
                text, met = self._text.finish()
                yield self._end(text, waiting, "stop" if met or token.finish_reason == "stop" else "length")
                return
            at = self._count(at)
            waiting.append(token)
            text, met = self._text.push(token.id)
            if met:
                yield self._end(text, waiting, "stop")
                return
            if text:
                yield TextChunk(text, tuple(waiting))
                waiting = []
        raise UnavailableError("the engine ended this answer without a reason")

    async def whole(self) -> Generated:
        """Return the answer once it is complete."""
        whole = Generated()
        async for piece in self.pieces():
            whole.text += piece.text
            whole.tokens += piece.tokens
            whole.finish = piece.finish or "stop"
        return whole

    def close(self) -> None:
        """Free the engine's row, if it still works for this answer."""
        self._engine.cancel(self._ask.request_id)
        self._stack.close()

    async def _in_time(self) -> AsyncIterator[Token]:
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

    def _count(self, before: float) -> float:
        now = time.monotonic()
        if self.new_tokens == 0:
            self._metrics.first_token(now - self._arrived)
        else:
            self._metrics.next_token(now - before)
        self.new_tokens += 1
        return now

    def _end(self, text: str, tokens: Sequence[Token], finish: Finish) -> TextChunk:
        seconds = time.monotonic() - self._arrived
        self._metrics.finished(finish, seconds=seconds, tokens=self.new_tokens)
        log.info(
            "Answered %s: %s prompt and %s new tokens in %.2f s (%s)",
            self._ask.request_id,
            len(self._ask.prompt_ids),
            self.new_tokens,
            seconds,
            finish,
            extra={
                "fields": {
                    "request_id": self._ask.request_id,
                    "adapter": self._ask.adapter,
                    "prompt_tokens": len(self._ask.prompt_ids),
                    "new_tokens": self.new_tokens,
                    "seconds": round(seconds, 3),
                    "finish": finish,
                }
            },
        )
        return TextChunk(text, tuple(tokens), finish)


class Generations:
    """The answers to one HTTP request (`n` choices, several prompts), all admitted or none."""

    def __init__(self, answers: Sequence[Generation], prompt_tokens: int, stack: ExitStack) -> None:
        self.answers = answers
        self.prompt_tokens = prompt_tokens
        self._stack = stack

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, over all answers."""
        return sum(answer.new_tokens for answer in self.answers)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the engine's cache, of the answer that found fewest."""
        return min(answer.cached_tokens for answer in self.answers)

    async def whole(self) -> list[Generated]:
        """Return all answers once they are complete; the first failure cancels the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer.whole()) for answer in self.answers]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def pieces(self) -> AsyncIterator[tuple[int, TextChunk]]:
        """Yield (index of the answer, piece) as they come."""
        if len(self.answers) == 1:
            async for piece in self.answers[0].pieces():
                yield 0, piece
            return
        streams = [answer.pieces() for answer in self.answers]
        following = {asyncio.ensure_future(_next(stream)): i for i, stream in enumerate(streams)}
        try:
            while following:
                done, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, piece = following.pop(task), task.result()
                    if piece.finish is None:
                        following[asyncio.ensure_future(_next(streams[index]))] = index
                    yield index, piece
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    def close(self) -> None:
        """Free what the answers still hold; called once, whatever happened."""
        self._stack.close()


async def _next(pieces: AsyncIterator[TextChunk]) -> TextChunk:
    return await anext(pieces)


class Generator:
    """Starts answers: what the routes have in common."""

    def __init__(self, lifecycle: Lifecycle, metrics: ServingMetrics, *, timeout_s: float) -> None:
        self.lifecycle = lifecycle
        self.metrics = metrics
        self._timeout_s = timeout_s

    def served(self) -> ServedModel:
        """Return what is served; UnavailableError while loading."""
        return self.lifecycle.served()

    def adapter(self, model: str | None, *, param: str = "model") -> str | None:
        """Return the adapter that `model` means, None for the base; UnknownModelError otherwise."""
        served = self.served()
        if model is None or model == served.name:
            return served.default
        if model not in served.engine.stats().adapters:
            raise UnknownModelError(
                f"model '{model}' is not served here; GET /v1/models lists {', '.join(served.models())}",
                param=param,
                code="model_not_found",
            )
        return model

    def start(self, asks: Sequence[GenerationRequest], *, n: int = 1) -> Generations:
        """Queue `n` answers to each of `asks`: all of them, or none and OverloadedError.

        The caller closes the batch when it is answered or given up.
        """
        served = self.served()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        with ExitStack() as stack:
            answers = []
            for ask in _choices(asks, n):
                answer = Generation(served, ask, metrics=self.metrics, deadline=deadline)
                stack.callback(answer.close)
                answers.append(answer)
            return Generations(answers, sum(len(ask.prompt_ids) for ask in asks), stack.pop_all())
        raise AssertionError("an exit stack swallows nothing")


def _choices(asks: Sequence[GenerationRequest], n: int) -> list[GenerationRequest]:
    """Return every answer to generate, each with an id of its own and a seed that differs by choice."""
    choices: list[GenerationRequest] = []
    for ask in asks:
        for choice in range(n):
            seed = ask.sampling.seed
            sampling = (
                replace(ask.sampling, seed=seed + choice) if seed is not None and choice else ask.sampling
            )
            number = len(choices)
            name = f"{ask.request_id}-{number}" if len(asks) * n > 1 else ask.request_id
            choices.append(replace(ask, sampling=sampling, request_id=name))
    return choices
