"""The engine for any architecture: one request at a time, in one thread, over `model.forward`.

Knows token ids. Does not know HTTP, text or how a row engine shares a step among requests. Read
`SimpleEngine._run` first: take, generate, answer.
"""

import itertools
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import ConfigError, RequestError, UnavailableError, UnknownModelError
from runtime.serving.engine.protocol import FinishReason, Request, Stats, Token
from runtime.serving.engine.request_queue import LAST_STEP_S, RequestHandle, RequestQueue
from runtime.serving.engine.sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PeftAdapters:
    """A base model with any number of adapters of any rank; `model` is what is called."""

    def __init__(self, base: "PreTrainedModel") -> None:
        self.model: Any = base
        self._base = base
        self._inside: dict[str, str] = {}
        self._numbers = itertools.count()
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that may be activated."""
        return tuple(self._inside)

    def add(self, name: str, folder: Path, *, strength: float) -> None:
        """Read the adapter in `folder`; ConfigError when it does not fit the base model."""
        from peft import PeftConfig, PeftModel
        from peft.tuners.lora import LoraLayer

        # peft keeps adapters under module names, which hold no dots: a user's name does
        inside = f"adapter{next(self._numbers)}"
        try:
            if self.model is self._base:
                shape = PeftConfig.from_pretrained(str(folder))
                self.model = PeftModel(self._base, shape, adapter_name=inside)
            self.model.load_adapter(str(folder), adapter_name=inside)
        except (ValueError, RuntimeError, KeyError) as error:
            self._take_out(inside)
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"adapter {name}: does not fit this model: {reason}") from error
        finally:
            self._active = "unknown"
        for module in self.model.modules():
            if isinstance(module, LoraLayer) and inside in module.scaling:
                module.scaling[inside] *= strength
        self.model.requires_grad_(False)
        self._inside[name] = inside

    def remove(self, name: str) -> None:
        """Forget an adapter that nobody uses any more."""
        self._take_out(self._inside.pop(name))

    def activate(self, name: str | None) -> None:
        """Make the next forward pass that of `name`, or of the base for None."""
        if self._active == name:
            return
        if name is None:
            if self._inside:
                self.model.base_model.disable_adapter_layers()
        elif name in self._inside:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._inside[name], inference_mode=True)
        else:
            raise UnknownModelError(f"adapter '{name}' is not resident")
        self._active = name

    def _take_out(self, inside: str) -> None:
        self._active = "unknown"
        if self.model is self._base or inside not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(inside)
        else:
            self.model = self.model.unload()


log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Prompt tokens per forward pass: between two passes a cancelled request is let go."""


class SimpleEngine:
    """Serves one row; `queue` requests wait for it, in the order of their arrival."""

    def __init__(self, model: "PreTrainedModel", *, context_tokens: int, queue: int) -> None:
        self.context_tokens = context_tokens
        self._residents = PeftAdapters(model)
        self._device = model.device
        self._desk = RequestQueue(rows=1, queue=queue, adapters=lambda: self._residents.names)
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
    def _generate(self, ticket: RequestHandle) -> FinishReason:
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

    def _logits(self, ticket: RequestHandle, generated: list[int]) -> Iterator[torch.Tensor]:
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
