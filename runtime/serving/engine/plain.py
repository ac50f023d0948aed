"""The engine for any architecture: one request at a time, in one thread, over `model.forward`.

Knows token ids. Does not know HTTP, text or how a row engine shares a step among requests. Read
`PlainEngine._run` first: take, generate, answer.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import OverloadedError, RequestError, UnavailableError, UnknownModelError
from runtime.serving.engine.protocol import Request, Stats, Token
from runtime.serving.engine.residents import Residents
from runtime.serving.engine.sampling import Sampler
from runtime.serving.engine.ticket import Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Prompt tokens per forward pass: between two passes a cancelled request is let go."""


class PlainEngine:
    """Serves one row; `queue` requests wait for it, in the order of their arrival."""

    def __init__(self, model: "PreTrainedModel", *, context_tokens: int, queue: int) -> None:
        self.context_tokens = context_tokens
        self._queue = queue
        self._residents = Residents(model)
        self._device = model.device
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._used_tokens = 0
        self._in_flight: Counter[str | None] = Counter()
        self._leaving: set[str] = set()
        self._progress = time.monotonic()
        self._closed = False
        self._changed = threading.Condition()
        self._weights = threading.Lock()  # held for one forward pass, or while adapters come and go
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise UnavailableError("the engine has stopped")
            if request.adapter is not None and not self._answers_to(request.adapter):
                raise UnknownModelError(f"adapter '{request.adapter}' is not resident")
            if len(self._waiting) >= self._queue + (self._running is None):
                raise OverloadedError(f"{self._queue} requests are waiting already; try again shortly")
            ticket = Ticket(request)
            self._in_flight[request.adapter] += 1
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket.read(on_leave=lambda: self._leave(ticket))

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        with self._changed:
            for ticket in (*self._waiting, *filter(None, (self._running,))):
                if ticket.request.id == request_id:
                    self._drop(ticket)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read an adapter; see `Engine.add_adapter`."""
        with self._weights:
            self._residents.add(name, folder, strength=strength)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter once nobody uses it; see `Engine.remove_adapter`."""
        with self._changed:
            if not self._answers_to(name):
                raise UnknownModelError(f"adapter '{name}' is not resident")
            self._leaving.add(name)
            self._changed.wait_for(lambda: not self._in_flight[name] or not self._thread.is_alive())
        with self._weights:
            self._residents.remove(name)
        self._leaving.discard(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        with self._changed:
            running = self._running is not None
            return Stats(
                running=int(running),
                waiting=len(self._waiting),
                kv_cache_share=self._used_tokens / self.context_tokens if running else 0.0,
                last_progress_s=self._progress if running else time.monotonic(),
                alive=self._thread.is_alive(),
                adapters=tuple(name for name in self._residents.names if name not in self._leaving),
            )

    def close(self) -> None:
        """Stop the thread after the step it is at; everything in flight ends as cancelled."""
        with self._changed:
            self._closed = True
            for ticket in (*self._waiting, *filter(None, (self._running,))):
                self._drop(ticket)
            self._changed.notify_all()

    def _answers_to(self, name: str) -> bool:
        return name in self._residents.names and name not in self._leaving

    def _leave(self, ticket: Ticket) -> None:
        """The reader is gone, or has read the end."""
        with self._changed:
            self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._retire(ticket)
            ticket.finish("cancelled")

    def _retire(self, ticket: Ticket) -> None:
        self._in_flight[ticket.request.adapter] -= 1
        self._changed.notify_all()

    def _run(self) -> None:
        while (ticket := self._take()) is not None:
            try:
                self._generate(ticket)
            except Exception as error:  # the thread answers the request and lives on
                ticket.post(_failure(error))
            finally:
                with self._changed:
                    self._running = None
                    self._retire(ticket)

    def _take(self) -> Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            self._progress = time.monotonic()
            return self._running

    @torch.inference_mode()
    def _generate(self, ticket: Ticket) -> None:
        sampling = ticket.request.sampling
        sampler = Sampler(sampling, ticket.request.prompt_ids)
        room = self.context_tokens - len(ticket.request.prompt_ids)
        for logits in self._logits(ticket, sampler.generated):
            if ticket.cancelled:
                ticket.finish("cancelled")
                return
            token = sampler.choose(logits)
            self._progress = time.monotonic()
            if token.id in sampling.stop_ids:
                ticket.finish("stop")
                return
            ticket.post(token)
            if len(sampler.generated) >= min(sampling.max_new_tokens, room):
                ticket.finish("length")
                return

    def _logits(self, ticket: Ticket, generated: list[int]) -> Iterator[torch.Tensor]:
        """Yield the logits (V,) after the prompt, then after each token that was appended to `generated`."""
        cache: Any = None
        fed = 0
        while True:
            past = (*ticket.request.prompt_ids, *generated)
            while fed < len(past):
                chunk = past[fed : fed + PREFILL_TOKENS]
                output = self._forward(ticket.request.adapter, chunk, cache)
                cache = output.past_key_values
                fed += len(chunk)
                self._used_tokens = fed
                self._progress = time.monotonic()
                if ticket.cancelled:
                    break
            yield output.logits[0, -1].float().cpu()

    def _forward(self, adapter: str | None, ids: tuple[int, ...], cache: Any) -> Any:
        """One pass over `ids` (T,) behind `cache`; the logits are those of the last position."""
        with self._weights:
            self._residents.activate(adapter)
            return self._residents.model(
                input_ids=torch.tensor([ids], device=self._device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )


def _failure(error: Exception) -> Exception:
    """Return what the client is told; the rest is in the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        log.error("Out of GPU memory; the request is answered 503 and the server goes on")
        return UnavailableError("out of GPU memory: send a shorter prompt or ask for fewer tokens")
    log.error("A request failed in the engine", exc_info=error)
    return UnavailableError("the engine failed on this request; its log says why")
