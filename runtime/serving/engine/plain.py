"""The engine for any architecture: one request at a time, in one thread, over `model.forward`.

Knows token ids. Does not know HTTP, text or how a row engine shares a step among requests. Read
`PlainEngine._run` first: take, generate, answer.
"""

import logging
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import RequestError, UnavailableError
from runtime.serving.engine.desk import LAST_STEP_S, Desk
from runtime.serving.engine.protocol import FinishReason, Request, Stats, Token
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
        self._residents = Residents(model)
        self._device = model.device
        self._desk = Desk(rows=1, queue=queue, adapters=lambda: self._residents.names)
        self._used_tokens = self._prompt_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`."""
        return self._desk.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._desk.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read an adapter; see `Engine.add_adapter`."""
        self._desk.errand(lambda: self._residents.add(name, folder, strength=strength))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter once nobody uses it; see `Engine.remove_adapter`."""
        self._desk.let_go(name)
        self._desk.errand(lambda: self._residents.remove(name))
        self._desk.forgotten(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        running = self._desk.running
        return Stats(
            running=running,
            waiting=self._desk.waiting,
            kv_cache_share=self._used_tokens / self.context_tokens if running else 0.0,
            last_progress_s=self._desk.last_progress_s,
            alive=self._thread.is_alive(),
            adapters=self._desk.adapters(),
            prompt_tokens=self._prompt_tokens,
        )

    def lose(self) -> None:
        """Nothing: this engine has no other processes."""

    def close(self) -> None:
        """Stop the thread after the step it is at; everything in flight ends as cancelled."""
        self._desk.close("cancelled")
        # an interpreter that ends while the thread is inside torch aborts the process
        self._thread.join(LAST_STEP_S)

    def _run(self) -> None:
        while self._desk.is_open:
            for ticket in self._desk.take(wait=True):
                try:
                    end: FinishReason | Exception = self._generate(ticket)
                except Exception as error:  # the thread answers the request and lives on
                    end = _failure(error)
                self._desk.finish(ticket, end)

    @torch.inference_mode()
    def _generate(self, ticket: Ticket) -> FinishReason:
        """Post the answer's tokens and return why it ended."""
        sampling = ticket.request.sampling
        sampler = Sampler(sampling, ticket.request.prompt_ids)
        self._prompt_tokens += len(ticket.request.prompt_ids)
        room = self.context_tokens - len(ticket.request.prompt_ids)
        for logits in self._logits(ticket, sampler.generated):
            if ticket.cancelled:
                break
            token = sampler.choose(logits)
            self._desk.progress()
            if token.id in sampling.stop_ids:
                return "stop"
            ticket.post(token)
            if len(sampler.generated) >= min(sampling.max_new_tokens, room):
                return "length"
        return "cancelled"

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
                self._desk.progress()
                if ticket.cancelled:
                    break
            yield output.logits[0, -1].float().cpu()

    def _forward(self, adapter: str | None, ids: tuple[int, ...], cache: Any) -> Any:
        """One pass over `ids` (T,) behind `cache`; the logits are those of the last position."""
        self._desk.run_errands()
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
