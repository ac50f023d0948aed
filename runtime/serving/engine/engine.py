"""The continuous-batching engine: one model, one thread, many sequences, an adapter per sequence.

Knows token ids and sequences. Does not know HTTP, chat templates or files (lora.py reads adapters). Read
`BatchingEngine.step` first: admit, run, choose, answer.
"""

import itertools
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.serving.engine import failures
from runtime.serving.engine.cuda_graphs import GraphBackend
from runtime.serving.engine.model_runner import ModelRunner, Rank
from runtime.serving.engine.parallel.group import Stop
from runtime.serving.engine.protocol import FinishReason, Request, Stats, Token
from runtime.serving.engine.request_queue import LAST_STEP_S, RequestHandle, RequestQueue
from runtime.serving.engine.sampling import Sampler
from runtime.serving.engine.scheduler import Scheduler, Sequence, StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
"""Prompt tokens run beside decoding sequences in one step: more is faster, fewer is smoother (RESULTS.md)."""
PREFILL_ONLY_TOKENS = 512
"""Prompt tokens run in one step when no sequence decodes."""
FAILURES_IN_A_ROW = 3
"""Steps that fail one after another before the engine gives up, so that a restart can help."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How many requests an engine answers and keeps waiting, and how long they may be."""

    max_sequences: int
    """Requests answered at the same time."""
    context_tokens: int
    """Longest prompt and answer together."""
    max_waiting: int
    """Requests that wait for one of those to end; a further one is refused."""
    draft_tokens: int = 0
    """Most draft tokens per sequence and step; 0 drafts none."""


class RunningRequest:
    """A request being answered: its handle, its sequence in the cache, and its sampler."""

    __slots__ = ("handle", "sampler", "sequence")

    def __init__(self, handle: RequestHandle, sequence: Sequence) -> None:
        self.handle, self.sequence = handle, sequence
        self.sampler = Sampler(handle.request.sampling, handle.request.prompt_ids)


class BatchingEngine:
    """Answers many requests at a time in one thread; more wait in order of arrival."""

    def __init__(
        self,
        model: "PreTrainedModel",
        limits: EngineLimits,
        *,
        rank: Rank | None = None,
        graph_backend: GraphBackend | None = None,
    ) -> None:
        """`rank` where `model` is rank 0's shard of one that several processes serve.

        Steps are captured with `graph_backend` where there is one.
        """
        self.context_tokens = limits.context_tokens
        self.max_sequences = limits.max_sequences
        self._rank = rank
        self._aborted = False
        self._scheduler = Scheduler(
            limits.max_sequences,
            chunk_tokens=CHUNK_TOKENS,
            prefill_only_tokens=PREFILL_ONLY_TOKENS,
            draft_tokens=limits.draft_tokens,
        )
        self._queue = RequestQueue(
            max_running=limits.max_sequences,
            max_waiting=limits.max_waiting,
            adapters=lambda: self._runner.adapters.names,
        )
        self._running: dict[Sequence, RunningRequest] = {}
        self._failures = 0
        self._prompt_tokens = self._cached_tokens = self._drafted_tokens = self._accepted_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._queue.call(lambda: self._prepare(model, graph_backend))
            undo.pop_all()

    def _prepare(self, model: "PreTrainedModel", graph_backend: GraphBackend | None) -> None:
        self._runner = ModelRunner(
            model,
            slots=self.max_sequences,
            positions=self.context_tokens,
            rank=self._rank,
            graph_backend=graph_backend,
        )

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`."""
        if not 0 < len(request.prompt_ids) < self.context_tokens:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens, expected 1 to {self.context_tokens - 1}",
                code="context_length_exceeded",
            )
        return self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._queue.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read an adapter; see `Engine.add_adapter`."""
        self._queue.call(lambda: self._add(name, folder, strength))

    def _add(self, name: str, folder: Path, strength: float) -> None:
        if name in self._runner.adapters.names:
            raise failures.already_loaded(name)
        self._runner.add_adapter(name, folder, strength)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter once no request uses it; see `Engine.remove_adapter`."""
        self._queue.drain_adapter(name)
        self._queue.call(lambda: self._scheduler.invalidate(self._runner.remove_adapter(name)))
        self._queue.adapter_removed(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        stats = self._queue.stats(
            kv_cache_share=self._scheduler.used_tokens / (self.max_sequences * self.context_tokens),
            alive=self._thread.is_alive() and not self._aborted,
        )
        return replace(
            stats,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            max_sequences=self.max_sequences,
            cache_tokens=self.max_sequences * self.context_tokens,
        )

    def close(self) -> None:
        """Stop the thread after its current step; everything in flight ends as cancelled."""
        self._queue.close("cancelled")
        # an interpreter that ends while the thread is inside torch aborts the process
        self._thread.join(LAST_STEP_S)
        if self._rank is not None:
            self._rank.wait()

    def abort(self) -> None:
        """Give up at once; see `Engine.abort`."""
        self._aborted = True
        self._queue.abort(failures.stopped())

    def _run(self) -> None:
        while self._queue.is_open:
            try:
                self.step()
            except Exception as error:  # the thread answers its requests and lives on
                self._fail(error)
        for running in tuple(self._running.values()):
            self._end(running, "cancelled")
        if self._rank is not None and not self._aborted:
            self._rank.group.broadcast(Stop())

    def step(self) -> None:
        """Admit waiting requests, run one step, and give each sequence its next token; waits when idle."""
        self._admit(self._queue.take(wait=not self._running))
        self._end_cancelled()
        if not self._running:
            return
        plan = self._scheduler.plan()
        logits = self._runner.run(plan)
        self._scheduler.commit(plan)
        self._queue.note_progress()
        self._failures = 0
        self._choose(plan, logits)

    def _admit(self, handles: list[RequestHandle]) -> None:
        for handle in handles:
            request = handle.request
            version = self._runner.adapters.version(request.adapter)
            # decided once, so that no answer changes midway; the last token is chosen and never run
            most = min(len(request.prompt_ids) + request.sampling.max_new_tokens, self.context_tokens)
            # a pass over several tokens rounds differently, which shows in a draw between two tokens; a seed
            # promises the same text
            repeatable = request.sampling.seed is not None and request.sampling.temperature > 0
            sequence = self._scheduler.admit(
                request.prompt_ids,
                adapter=version,
                draft_until=0 if repeatable else most,
                long=self._runner.is_long(most - 1),
            )
            self._running[sequence] = RunningRequest(handle, sequence)

    def _end_cancelled(self) -> None:
        for running in [each for each in self._running.values() if each.handle.cancelled]:
            self._end(running, "cancelled")

    def _choose(self, plan: StepPlan, logits: Tensor) -> None:
        """Give the sequences of `plan` their next tokens; logits (C, V) in the plan's order."""
        due: list[tuple[Sequence, tuple[int, ...]]] = [(sequence, ()) for sequence in plan.decode]
        due += [(draft.sequence, draft.tokens) for draft in plan.drafts]
        due += [(chunk.sequence, ()) for chunk in plan.chunks if chunk.completes]
        if not due:
            return
        highest, likeliest = logits.max(dim=-1)  # NaN or Inf anywhere in a token's logits shows here
        drawing = any(not self._running[sequence].sampler.is_greedy for sequence, _ in due)
        host = logits.float().cpu() if drawing else logits
        outputs = zip(highest.isfinite().tolist(), likeliest.tolist(), host, strict=True)
        for sequence, draft in due:
            running = self._running[sequence]
            if len(sequence.ids) == sequence.prompt_tokens:
                self._prompt_tokens += sequence.prompt_tokens
                self._cached_tokens += sequence.reused
                running.handle.note_cached(sequence.reused)
            following = list(itertools.islice(outputs, 1 + len(draft)))
            self._drafted_tokens += len(draft)
            if draft and not all(finite for finite, *_ in following):
                self._retry_without_draft(sequence)
                continue
            self._advance(running, following[0])
            accepted = 0
            while sequence in self._running and accepted < len(draft) and sequence.ids[-1] == draft[accepted]:
                # an accepted token was run with its draft, so it is in the cache
                accepted, sequence.filled = accepted + 1, sequence.filled + 1
                self._advance(running, following[accepted])
            if draft:
                sequence.lookup.record(drafted=len(draft), accepted=accepted, length=len(sequence.ids))
                self._accepted_tokens += accepted

    def _retry_without_draft(self, sequence: Sequence) -> None:
        """Undo a drafted step whose output has NaN or Inf: without a draft it shows where that comes from.

        A wrong draft token can cause it for the tokens before it: masked out, it still counts 0 times NaN.
        """
        sequence.draft_until = 0
        sequence.filled -= 1
        self._runner.clear(sequence.slot, sequence.filled)

    def _advance(self, running: RunningRequest, output: tuple[bool, int, Tensor]) -> None:
        """Give one sequence its next token; `output`: are the logits finite, likeliest token, logits (V,)."""
        finite, likeliest, logits = output
        if not finite:
            self._end_invalid(running)
        elif running.sampler.is_greedy:
            self._give(running, running.sampler.accept(likeliest))
        else:
            self._sample(running, logits)

    def _sample(self, running: RunningRequest, logits: Tensor) -> None:
        """Choose one sequence's next token; a constraint that fails ends that one alone. logits (V,)."""
        try:
            token = running.sampler.choose(logits)
        except RequestError as failure:
            self._end(running, failure)
            return
        self._give(running, token)

    def _give(self, running: RunningRequest, token: Token) -> None:
        """Post `token`, and end the answer where it must end."""
        sampling, sequence = running.handle.request.sampling, running.sequence
        if token.id is None or token.id in sampling.stop_ids:
            self._end(running, "stop")
            return
        sequence.ids.append(token.id)
        running.handle.post(token)
        new_tokens = len(sequence.ids) - sequence.prompt_tokens
        if new_tokens >= sampling.max_new_tokens or len(sequence.ids) >= self.context_tokens:
            self._end(running, "length")

    def _end(self, running: RunningRequest, end: FinishReason | Exception) -> None:
        del self._running[running.sequence]
        self._scheduler.release(running.sequence)
        self._queue.finish(running.handle, end)

    def _end_invalid(self, running: RunningRequest) -> None:
        """End a sequence whose logits are not finite, and leave nothing of it in the cache."""
        log.error("Request %s: the model's output contains NaN or Inf", running.handle.request.id)
        slot = running.sequence.slot
        running.sequence.filled = 0
        self._end(running, failures.invalid_output())
        self._runner.clear(slot, 0)

    def _fail(self, error: Exception) -> None:
        """Answer the requests that a failed step cost: the newest when memory ran out, else all of them."""
        self._failures += 1
        lost = list(self._running.values())
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            log.error("Out of GPU memory; the newest request is answered 503 and the others go on")
            reason = failures.out_of_memory()
            lost = lost[-1:]
        else:
            log.error("A step of %d sequences failed in the engine", len(lost), exc_info=error)
            reason = failures.failed()
            self._scheduler.invalidate(everything=True)
        for running in lost:
            running.sequence.filled = 0  # what the step left in the cache cannot be trusted
            self._end(running, reason)
        if self._rank is not None:  # the other processes may be at another step by now
            self.abort()
        elif self._failures >= FAILURES_IN_A_ROW:
            log.critical("%d steps failed one after another; the engine stops", self._failures)
            self._queue.abort(failures.stopped())
