"""The engine for any architecture: one request at a time, in one thread, over `model.forward`.

Knows token ids. Does not know HTTP, text or how the batching engine shares a step among requests. Read
`SimpleEngine._run` first: take, generate, answer.
"""

import itertools
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import Failure
from runtime.serving.engine import failures
from runtime.serving.engine.protocol import FinishReason, Request, Stats, Token
from runtime.serving.engine.request_queue import LAST_STEP_S, RequestHandle, RequestQueue
from runtime.serving.engine.sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Prompt tokens per forward pass: a cancelled request ends between two passes."""


class PeftAdapters:
    """A base model with any number of adapters of any rank; `model` is what is called."""

    def __init__(self, base: "PreTrainedModel") -> None:
        self.model: Any = base
        self._base = base
        self._peft_names: dict[str, str] = {}
        self._numbers = itertools.count()
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that may be activated."""
        return tuple(self._peft_names)

    def add(self, name: str, folder: Path, *, strength: float) -> None:
        """Read the adapter in `folder`; ConfigError when it does not fit the base model."""
        from peft import PeftConfig, PeftModel
        from peft.tuners.lora import LoraLayer

        # peft uses the name as a module's, which may hold no dots; a user's name may
        peft_name = f"adapter{next(self._numbers)}"
        try:
            if self.model is self._base:
                shape = PeftConfig.from_pretrained(str(folder))
                self.model = PeftModel(self._base, shape, adapter_name=peft_name)
            self.model.load_adapter(str(folder), adapter_name=peft_name)
        except (ValueError, RuntimeError, KeyError) as error:
            self._unload(peft_name)
            reason = " ".join(str(error).split())[:300]
            raise failures.does_not_fit(name, reason) from error
        finally:
            self._active = "unknown"
        for module in self.model.modules():
            if isinstance(module, LoraLayer) and peft_name in module.scaling:
                module.scaling[peft_name] *= strength
        self.model.requires_grad_(False)
        self._peft_names[name] = peft_name

    def remove(self, name: str) -> None:
        """Remove an adapter that no request uses any more."""
        self._unload(self._peft_names.pop(name))

    def activate(self, name: str | None) -> None:
        """Make `name` the adapter of the next forward pass; None is the base model."""
        if self._active == name:
            return
        if name is None:
            if self._peft_names:
                self.model.base_model.disable_adapter_layers()
        elif name in self._peft_names:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._peft_names[name], inference_mode=True)
        else:
            raise failures.not_loaded(name)
        self._active = name

    def _unload(self, peft_name: str) -> None:
        self._active = "unknown"
        if self.model is self._base or peft_name not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(peft_name)
        else:
            self.model = self.model.unload()


class SimpleEngine:
    """Answers one request at a time; `max_waiting` more wait, in the order of their arrival."""

    def __init__(self, model: "PreTrainedModel", *, context_tokens: int, max_waiting: int) -> None:
        self.context_tokens = context_tokens
        self.max_sequences = 1
        self._adapters = PeftAdapters(model)
        self._device = model.device
        self._queue = RequestQueue(
            max_running=1, max_waiting=max_waiting, adapters=lambda: self._adapters.names
        )
        self._used_tokens = self._prompt_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`."""
        return self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._queue.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read an adapter; see `Engine.add_adapter`."""
        self._queue.call(lambda: self._adapters.add(name, folder, strength=strength))

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter once no request uses it; see `Engine.remove_adapter`."""
        self._queue.drain_adapter(name)
        self._queue.call(lambda: self._adapters.remove(name))
        self._queue.adapter_removed(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        used = self._used_tokens / self.context_tokens if self._queue.running else 0.0
        stats = self._queue.stats(kv_cache_share=used, alive=self._thread.is_alive())
        return replace(stats, prompt_tokens=self._prompt_tokens, cache_tokens=self.context_tokens)

    def close(self) -> None:
        """Stop the thread after its current step; everything in flight ends as cancelled."""
        self._queue.close("cancelled")
        # an interpreter that ends while the thread is inside torch aborts the process
        self._thread.join(LAST_STEP_S)

    def abort(self) -> None:
        """Give up at once; see `Engine.abort`."""
        self._queue.abort(failures.stopped())

    def _run(self) -> None:
        while self._queue.is_open:
            for handle in self._queue.take(wait=True):
                try:
                    end: FinishReason | Exception = self._generate(handle)
                except Exception as error:  # the thread answers the request and lives on
                    end = _failure_of(error)
                self._queue.finish(handle, end)

    @torch.inference_mode()
    def _generate(self, handle: RequestHandle) -> FinishReason:
        """Post the answer's tokens and return why it ended."""
        sampling = handle.request.sampling
        sampler = Sampler(sampling, handle.request.prompt_ids)
        self._prompt_tokens += len(handle.request.prompt_ids)
        room = self.context_tokens - len(handle.request.prompt_ids)
        for logits in self._logits(handle, sampler.generated):
            if handle.cancelled:
                break
            token = sampler.choose(logits)
            self._queue.note_progress()
            if token.id in sampling.stop_ids:
                return "stop"
            handle.post(token)
            if len(sampler.generated) >= min(sampling.max_new_tokens, room):
                return "length"
        return "cancelled"

    def _logits(self, handle: RequestHandle, generated: list[int]) -> Iterator[torch.Tensor]:
        """Yield the logits (V,) after the prompt, then after each token that was appended to `generated`."""
        cache: Any = None
        fed = 0
        while True:
            past = (*handle.request.prompt_ids, *generated)
            while fed < len(past):
                chunk = past[fed : fed + PREFILL_TOKENS]
                output = self._forward(handle.request.adapter, chunk, cache)
                cache = output.past_key_values
                fed += len(chunk)
                self._used_tokens = fed
                self._queue.note_progress()
                if handle.cancelled:
                    break
            yield output.logits[0, -1].float().cpu()

    def _forward(self, adapter: str | None, ids: tuple[int, ...], cache: Any) -> Any:
        """One pass over `ids` (T,) behind `cache`; the logits are those of the last position."""
        self._queue.run_calls()
        self._adapters.activate(adapter)
        return self._adapters.model(
            input_ids=torch.tensor([ids], device=self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


def _failure_of(error: Exception) -> Failure:
    """Return the failure that the client gets for `error`; the rest is in the log."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        log.error("Out of GPU memory; the request is answered 503 and the server goes on")
        return failures.out_of_memory()
    return failures.of(error)
