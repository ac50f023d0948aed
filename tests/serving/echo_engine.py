"""An engine without a model, for tests of everything around it.

It obeys `engine.protocol.Engine` with real asyncio behaviour: several requests at a time, a bounded queue,
cancellation by the next token, failures on demand. It answers with the prompt's own token ids, again and
again, or with what `script` returns.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from runtime.serving.engine import failures
from runtime.serving.engine.protocol import FinishReason, Request, Start, Stats, Token

Outbox: TypeAlias = "asyncio.Queue[Token | Exception]"


class EchoEngine:
    """Gives one token every `pace_s` to each of at most `rows` requests, after `prompt_s` for its prompt.

    Prompts share that time, as those that take turns on one processor: two at once take twice as long.
    """

    def __init__(
        self,
        *,
        rows: int = 4,
        queue: int = 8,
        pace_s: float = 0.0,
        prompt_s: float = 0.0,
        context_tokens: int = 512,
        adapters: Sequence[str] = (),
        script: Callable[[Request], Sequence[int]] | None = None,
        dies_after: int | None = None,
        close_s: float = 0.0,
    ) -> None:
        self.context_tokens = context_tokens
        self.max_sequences = rows
        self.requests: list[Request] = []
        self.produced = 0
        self.hanging = False
        self.failure: Exception | None = None
        self.fail_after = 0
        self._rows = rows
        self._free = asyncio.Semaphore(rows)
        self._queue = queue
        self._pace_s, self._prompt_s = pace_s, prompt_s
        self._prompts = 0
        self._adapters = list(adapters)
        self._script = script
        self._dies_after = dies_after
        self._close_s = close_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: set[str] = set()
        self._closed = False
        self._progress = time.monotonic()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        if self._closed:
            raise failures.stopped()
        if request.adapter is not None and request.adapter not in self._adapters:
            raise failures.not_loaded(request.adapter)
        if len(self._tasks) >= self._rows + self._queue:
            raise failures.queue_full(self._queue)
        assert request.id not in self._tasks, "request ids are unique in flight"
        self.requests.append(request)
        outbox: Outbox = asyncio.Queue()
        task = asyncio.create_task(self._generate(request, outbox))
        self._tasks[request.id] = task
        task.add_done_callback(lambda _: self._retire(request.id, outbox))
        return self._read(request.id, outbox)

    def cancel(self, request_id: str) -> None:
        if request_id in self._tasks:
            self._tasks[request_id].cancel()

    def stats(self) -> Stats:
        if not self._running:
            self._progress = time.monotonic()
        return Stats(
            running=len(self._running),
            waiting=len(self._tasks) - len(self._running),
            kv_cache_share=len(self._running) / self._rows,
            last_progress_s=self._progress,
            alive=not self._closed,
            adapters=tuple(self._adapters),
            prompt_tokens=sum(len(request.prompt_ids) for request in self.requests),
            cached_tokens=len(self.requests),
            max_sequences=self._rows,
            cache_tokens=self._rows * self.context_tokens,
            max_requests=self._rows + self._queue,
        )

    def close(self) -> None:
        self._closed = True
        time.sleep(self._close_s)
        for task in self._tasks.values():
            task.cancel()

    def abort(self) -> None:
        self.close()

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        self._adapters.append(name)

    def remove_adapter(self, name: str) -> None:
        self._adapters.remove(name)

    async def _read(self, request_id: str, outbox: Outbox) -> AsyncIterator[Token]:
        try:
            while True:
                token = await outbox.get()
                if isinstance(token, Exception):
                    raise token
                yield token
                if token.id is None:
                    return
        finally:
            self.cancel(request_id)

    def _retire(self, request_id: str, outbox: Outbox) -> None:
        del self._tasks[request_id]
        outbox.put_nowait(Token(None, "cancelled"))  # read only when nothing else ended the answer

    async def _generate(self, request: Request, outbox: Outbox) -> None:
        submitted = time.monotonic()
        async with self._free:
            self._running.add(request.id)
            try:
                await self._tokens(request, outbox, Start(time.monotonic() - submitted, cached_tokens=1))
            finally:
                self._running.discard(request.id)

    async def _read_prompt(self) -> None:
        left_s, self._prompts = self._prompt_s, self._prompts + 1
        try:
            while left_s > 0:
                await asyncio.sleep(0.01)
                left_s -= 0.01 / self._prompts
        finally:
            self._prompts -= 1

    async def _tokens(self, request: Request, outbox: Outbox, start: Start) -> None:
        await self._read_prompt()
        if request.sampling.prompt_logprobs:
            following = (self._scored(request, token) for token in request.prompt_ids[1:])
            start = replace(start, prompt=(Token(request.prompt_ids[0]), *following))
        limit = request.sampling.max_new_tokens
        echo = [request.prompt_ids[i % len(request.prompt_ids)] for i in range(limit)]
        answer = self._script(request) if self._script else echo
        finish: FinishReason = "stop" if len(answer) < limit else "length"
        for count, token in enumerate(answer[:limit]):
            await asyncio.sleep(self._pace_s)
            while self.hanging:
                await asyncio.sleep(0.01)
            if self.failure is not None and count >= self.fail_after:
                outbox.put_nowait(self.failure)
                return
            self.produced += 1
            if self.produced == self._dies_after:
                self.close()
            self._progress = time.monotonic()
            begun = start if count == 0 else None
            if request.sampling.top_logprobs is None:
                outbox.put_nowait(Token(token, start=begun))
            else:
                outbox.put_nowait(replace(self._scored(request, token), start=begun))
        outbox.put_nowait(self._finished(finish, None if limit and answer else start))

    @staticmethod
    def _finished(finish: FinishReason, start: Start | None) -> Token:
        return Token(None, finish, start=start)

    @staticmethod
    def _scored(request: Request, token: int) -> Token:
        likeliest = ((token, -0.5), (0, -1.5))[: request.sampling.top_logprobs]
        return Token(token, logprob=-0.5, top=likeliest)
