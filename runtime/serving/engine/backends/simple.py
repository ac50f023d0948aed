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

from runtime.errors import CapacityError, is_out_of_memory, one_line
from runtime.memory.pool import SCORED_TOKENS
from runtime.serving.engine import failures
from runtime.serving.engine.out_of_memory import FLOOR_TOKENS, MemoryLimits, Reason, free_memory
from runtime.serving.engine.prompt_scores import PromptScores, pack
from runtime.serving.engine.protocol import FinishReason, Request, Stats, Token
from runtime.serving.engine.request_queue import LAST_STEP_S, End, RequestHandle, RequestQueue
from runtime.serving.engine.running import ended_by
from runtime.serving.engine.sampler import Sampler
from runtime.serving.engine.sampling import TokenChooser

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
        reason = ""
        try:
            if self.model is self._base:
                shape = PeftConfig.from_pretrained(str(folder))
                self.model = PeftModel(self._base, shape, adapter_name=peft_name)
            self.model.load_adapter(str(folder), adapter_name=peft_name)
        except (ValueError, RuntimeError, KeyError, MemoryError) as error:
            reason = one_line(error) or type(error).__name__
            no_memory = is_out_of_memory(error)
        finally:
            self._active = "unknown"
        if reason:  # not in the handler: the traceback holds what was read
            self._unload(peft_name)
            raise failures.no_memory_for_adapter(name) if no_memory else failures.does_not_fit(name, reason)
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
        if self.model is self._base:
            _remove_layers(self._base)  # of an adapter that was attached in part
            return
        if peft_name not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(peft_name)
        else:
            self.model = self.model.unload()


def _remove_layers(model: "PreTrainedModel") -> None:
    """Put the model's own layers back where an adapter's stand around them."""
    from peft.tuners.lora import LoraLayer

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer):
                setattr(module, name, child.get_base_layer())


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
        self._memory = MemoryLimits()
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
        self._queue.call(lambda: self._add(name, folder, strength))

    def _add(self, name: str, folder: Path, strength: float) -> None:
        try:
            self._adapters.add(name, folder, strength=strength)
        except CapacityError:
            self._memory.counts["adapter"] += 1
            free_memory(self._device)
            raise

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter once no request uses it; see `Engine.remove_adapter`."""
        self._queue.drain_adapter(name)
        self._queue.call(lambda: self._adapters.remove(name))
        self._queue.adapter_removed(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        used = self._used_tokens / self.context_tokens if self._queue.running else 0.0
        stats = self._queue.stats(kv_cache_share=used, alive=self._thread.is_alive())
        return replace(
            stats,
            prompt_tokens=self._prompt_tokens,
            cache_tokens=self.context_tokens,
            out_of_memory=self._memory.counts,
            prompt_tokens_limit=self._memory.prompt_tokens,
        )

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
                self._queue.finish(handle, self._end_of(handle))

    def _end_of(self, handle: RequestHandle) -> End:
        """Answer a request, and return the end of its answer or its failure."""
        try:
            return self._generate(handle)
        except Exception as error:  # the thread answers the request and lives on
            if not is_out_of_memory(error):
                return failures.of(error)
        free_memory(self._device)  # not in the handler: the traceback holds the cache
        in_prompt = self._used_tokens < len(handle.request.prompt_ids)
        reason: Reason = "prompt" if in_prompt else "decode"
        return self._memory.refuse(handle.request.id, reason, tokens=self._used_tokens + 1)

    @torch.inference_mode()
    def _generate(self, handle: RequestHandle) -> FinishReason | Token:
        """Post the answer's tokens and return why it ended."""
        sampling = handle.request.sampling
        sampler, chooser = Sampler(sampling, handle.request.prompt_ids), TokenChooser()
        scores = PromptScores(handle.request.prompt_ids, sampling.top_logprobs or 0)
        self._prompt_tokens += len(handle.request.prompt_ids)
        room = self.context_tokens - len(handle.request.prompt_ids)
        for logits in self._logits(handle, sampler.generated, scores):
            if handle.cancelled:
                break
            if sampling.prompt_logprobs and not sampler.generated:
                prompt = scores.read()
                if prompt is None:
                    raise failures.invalid_output()
                handle.note_prompt(prompt)
            row = sampler.row()
            (choice,) = chooser.choose(logits, [row])
            self._queue.note_progress()
            if not choice.finite:
                raise failures.invalid_output()
            if not sampling.max_new_tokens:
                return "length"
            token = sampler.take(row, choice)
            if token.id in sampling.stop_ids:
                return ended_by(token)
            handle.post(token)
            if len(sampler.generated) >= min(sampling.max_new_tokens, room):
                return "length"
        return "cancelled"

    def _logits(
        self, handle: RequestHandle, generated: list[int], scores: PromptScores
    ) -> Iterator[torch.Tensor]:
        """Yield the logits (1, V) after the prompt, then after each token appended to `generated`.

        The prompt's own tokens are scored where that is wanted.
        """
        cache: Any = None
        fed, prompt_tokens = 0, len(handle.request.prompt_ids)
        most = SCORED_TOKENS if handle.request.sampling.prompt_logprobs else PREFILL_TOKENS
        while True:
            past = (*handle.request.prompt_ids, *generated)
            while fed < len(past):
                self._used_tokens = fed
                count = min(most, len(past) - fed)
                count = min(count, self._memory.most_tokens(fed + count))
                output = self._attempt(handle.request, past[fed : fed + count], cache)
                if output is None:  # what the pass left in the cache cannot be taken out of every kind
                    self._memory.counts["divided"] += 1
                    self._memory.lower_prompt(count, fed + count)
                    cache, fed = None, 0
                    scores.clear()
                    continue
                cache = output.past_key_values
                scored = min(fed + count, prompt_tokens - 1) - fed
                if handle.request.sampling.prompt_logprobs and scored > 0:
                    following = past[fed + 1 : fed + 1 + scored]
                    logits = output.logits[0, :scored]
                    scores.add(pack(following, logits, alternatives=scores.alternatives))
                fed += count
                self._queue.note_progress()
                if handle.cancelled:
                    break
            self._used_tokens = fed
            yield output.logits[0, -1:]

    def _attempt(self, request: Request, ids: tuple[int, ...], cache: Any) -> Any:
        """One pass over `ids` (T,) behind `cache`; None where it ran out of memory and can be shorter."""
        try:
            return self._forward(request, ids, cache)
        except Exception as error:
            if len(ids) <= FLOOR_TOKENS or not is_out_of_memory(error):
                raise
        free_memory(self._device)  # not in the handler: the traceback holds the tensors of the pass
        return None

    def _forward(self, request: Request, ids: tuple[int, ...], cache: Any) -> Any:
        """One pass over `ids` (T,) behind `cache`; the logits are those of the last position, or of all."""
        self._queue.run_calls()
        self._adapters.activate(request.adapter)
        return self._adapters.model(
            input_ids=torch.tensor([ids], device=self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(ids) if request.sampling.prompt_logprobs else 1,
        )
