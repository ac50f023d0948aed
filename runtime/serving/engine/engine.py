"""The continuous-batching engine: one model, one thread, many sequences, an adapter per sequence.

Where the device works beside the host, a step is launched before the tokens of the one before it are read:
they are checked and posted while it runs. Knows token ids and sequences. Does not know HTTP, chat templates
or files (lora.py reads adapters). Read `BatchingEngine.step` first: admit, run, answer, choose.
"""

import itertools
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from runtime.errors import CapacityError, Failure, RequestError, is_out_of_memory
from runtime.memory.pool import STEP_TOKENS, PoolSize, window_span
from runtime.serving.engine import failures
from runtime.serving.engine.cuda_graphs import GraphBackend
from runtime.serving.engine.kv_pool import LayerKinds
from runtime.serving.engine.model_runner import ModelRunner, Rank
from runtime.serving.engine.out_of_memory import MemoryLimits, Reason, divide, is_explained
from runtime.serving.engine.parallel.group import Stop
from runtime.serving.engine.pending import Choosing, PendingTokens, RowOutput, due_of, keep
from runtime.serving.engine.pool_map import ArenaSize
from runtime.serving.engine.protocol import Request, Stats, Token
from runtime.serving.engine.request_queue import LAST_STEP_S, End, RequestQueue
from runtime.serving.engine.running import RunningRequest, ended_by, keep_scores
from runtime.serving.engine.scheduler import Scheduler, Sequence, StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
"""Prompt tokens run beside decoding sequences in one step: more is faster, fewer is smoother (RESULTS.md)."""
PREFILL_ONLY_TOKENS = STEP_TOKENS
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
    positions: tuple[int, ...] = ()
    """Of the key-value pool, by kind of layer; empty for all sequences at their longest."""
    draft_tokens: int = 0
    """Most draft tokens per sequence and step; 0 drafts none."""


class BatchingEngine:
    """Answers many requests at a time in one thread; more wait in order of arrival."""

    def __init__(
        self,
        model: "PreTrainedModel",
        limits: EngineLimits,
        *,
        rank: Rank | None = None,
        graph_backend: GraphBackend | None = None,
        overlap: bool | None = None,
    ) -> None:
        """`rank` where `model` is rank 0's shard of one that several processes serve.

        Steps are captured with `graph_backend` where there is one. `overlap` launches a step before the host
        has read the tokens of the one before: None where that is faster, so not on a CPU.
        """
        self.context_tokens = limits.context_tokens
        self.max_sequences = limits.max_sequences
        self._rank = rank
        self._aborted = False
        # the other ranks do not have the tokens that rank 0 chooses
        self._overlaps = rank is None and (model.device.type == "cuda" if overlap is None else overlap)
        self._size = _pool_size(model, limits)
        self._scheduler = _scheduler(self._size, LayerKinds.of(model.config).windows, limits)
        self._queue = RequestQueue(
            max_running=limits.max_sequences,
            max_waiting=limits.max_waiting,
            adapters=lambda: self._runner.adapters.names,
        )
        self._running: dict[Sequence, RunningRequest] = {}
        self._memory = MemoryLimits()
        self._pending: PendingTokens | None = None
        """The tokens of the last step, while the host has not read them."""
        self._failures = self._unexplained = 0
        self._prompt_tokens = self._cached_tokens = self._drafted_tokens = self._accepted_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._queue.call(lambda: self._prepare(model, graph_backend))
            undo.pop_all()

    def _prepare(self, model: "PreTrainedModel", graph_backend: GraphBackend | None) -> None:
        try:
            self._runner = ModelRunner(model, self._size, rank=self._rank, graph_backend=graph_backend)
            self._choosing = Choosing(self._runner.free_memory)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise CapacityError(
                f"no memory for keys and values of {max(self._size.positions)} tokens; lower limits.rows, "
                "limits.context_tokens or limits.gpu_memory_share"
            ) from None

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`."""
        if not 0 < len(request.prompt_ids) < self.context_tokens:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens, expected 1 to {self.context_tokens - 1}",
                code="context_length_exceeded",
            )
        if self._most_tokens(request) > self._scheduler.longest:
            raise failures.larger_than_the_pool(request, self._scheduler.longest)
        return self._queue.submit(request)

    def _most_tokens(self, request: Request) -> int:
        """Return how many tokens prompt and answer have together, at most."""
        return min(len(request.prompt_ids) + request.sampling.max_new_tokens, self.context_tokens)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._queue.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read an adapter, in this thread, and take it between two steps; see `Engine.add_adapter`."""
        try:
            weights = self._runner.read_adapter(name, folder, strength)
            self._queue.call(lambda: self._runner.add_adapter(name, folder, strength, weights=weights))
        except CapacityError:
            self._memory.counts["adapter"] += 1
            raise

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter once no request uses it; see `Engine.remove_adapter`."""
        self._queue.drain_adapter(name)
        self._queue.call(lambda: self._scheduler.invalidate(self._runner.remove_adapter(name)))
        self._queue.adapter_removed(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        stats = self._queue.stats(
            kv_cache_share=self._scheduler.used_share,
            alive=self._thread.is_alive() and not self._aborted,
        )
        put_off = min(len(self._scheduler.put_off), stats.running)
        return replace(
            stats,
            running=stats.running - put_off,
            waiting=stats.waiting + put_off,
            preemptions=self._scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            max_sequences=self.max_sequences,
            cache_tokens=self._size.tokens,
            out_of_memory=self._memory.counts,
            prompt_tokens_limit=self._memory.prompt_tokens,
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
        """Admit waiting requests, launch a step, and answer with the tokens of the one before, or its own.

        Waits when idle.
        """
        self._queue.wait(idle=not self._running)
        self._admit()
        self._end_cancelled()
        if not self._running:
            self._pending = None
            return
        unexplained = self._unexplained
        plan = self._scheduler.plan(self._memory.most_tokens)
        self._runner.move(self._scheduler.take_moves())
        for part in self._memory.within(plan):
            self._run_plan(part)
        if plan.is_empty:  # each sequence has its last token
            self._settle()
        if self._unexplained > unexplained:
            self._count_failure()

    def _run_plan(self, plan: StepPlan) -> bool:
        """Run `plan`, in smaller passes where memory runs out; return whether one pass was enough."""
        plan = plan.keep(self._goes_on)
        if plan.is_empty:
            return True
        logits = self._attempt(plan)
        again = self._settle()
        if logits is not None:
            # what it wrote for others is behind what they have filled, and nobody's before a later step
            plan, logits = keep(plan, logits, lambda each: each not in again and self._goes_on(each))
            self._scheduler.commit(plan)
            self._queue.note_progress()
            self._failures = 0
            self._choose(plan, logits)
            return True
        plan = plan.keep(self._goes_on)
        parts = divide(plan)
        if parts:
            first, *others = [self._run_plan(part) for part in parts]
            self._memory.lower(plan, decode_fits=first and bool(others))
        elif not plan.is_empty:
            self._refuse(plan)
        return False

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether a sequence of a plan has neither ended since, nor begins anew."""
        return sequence in self._running and bool(sequence.extents)

    def _attempt(self, plan: StepPlan) -> Tensor | None:
        """Return the logits (C, V) of `plan`, or None where memory ran out; the pass holds none any more."""
        try:
            chosen = self._pending.chosen if self._pending is not None else None
            logits = self._runner.run(plan) if chosen is None else self._runner.run(plan, chosen.tokens)
            return keep_scores(self._running, plan, logits)
        except Exception as error:
            # other ranks are within the same pass, which can neither be ended nor repeated
            if self._rank is not None or not is_out_of_memory(error):
                raise
        self._runner.free_memory()  # not in the handler: the traceback holds the tensors of the pass
        return None

    def _refuse(self, plan: StepPlan) -> None:
        """End the one sequence of `plan`, for which there is no memory even alone."""
        reason: Reason = "prompt" if plan.chunks else "decode"
        sequence = plan.chunks[0].sequence if plan.chunks else plan.decode[0]
        tokens = plan.chunks[0].end if plan.chunks else len(sequence.ids)
        self._unexplained += not is_explained(tokens)
        self._end_for_memory(sequence, reason, tokens)

    def _end_for_memory(self, sequence: Sequence, reason: Reason, tokens: int) -> None:
        """End a sequence that ran out of memory at its `tokens`-th token; its cache up to there is right."""
        running = self._running[sequence]
        self._end(running, self._memory.refuse(running.handle.request.id, reason, tokens=tokens))

    def _admit(self) -> None:
        """Begin with the waiting requests, in order, as long as there is room for their prompts."""
        while (handle := self._queue.first()) is not None:
            request = handle.request
            sequence = self._begin(request)
            if sequence is None:
                return
            if not self._queue.begin(handle):  # it was cancelled meanwhile
                self._scheduler.release(sequence)
                continue
            try:
                self._running[sequence] = RunningRequest(handle, sequence)
            except Exception as error:  # a constraint that cannot begin, no memory for the sampler
                self._scheduler.release(sequence)
                failure = failures.of(error)
                if is_out_of_memory(error):
                    failure = self._memory.refuse(request.id, "sampling", tokens=len(request.prompt_ids))
                self._queue.finish(handle, failure)

    def _begin(self, request: Request) -> Sequence | None:
        """Return the sequence of a request; None while there is no room for it."""
        # decided once, so that no answer changes midway; the last token is chosen and never run
        most = self._most_tokens(request)
        # a pass over several tokens rounds differently, which shows in a draw between two tokens; a seed
        # promises the same text
        repeatable = request.sampling.seed is not None and request.sampling.temperature > 0
        return self._scheduler.admit(
            request.prompt_ids,
            adapter=self._runner.adapters.version(request.adapter),
            most=most,
            drafts=not repeatable,
            long=self._runner.is_long(most - 1),
            scores=request.sampling.prompt_logprobs,
        )

    def _end_cancelled(self) -> None:
        for running in [each for each in self._running.values() if each.handle.cancelled]:
            self._end(running, "cancelled")

    def _choose(self, plan: StepPlan, logits: Tensor) -> None:
        """Have the tokens of the sequences of `plan` chosen; logits (C, V) in the plan's order."""
        due = due_of(plan)
        if not due:
            return
        samplers = [self._running[sequence].sampler for sequence, _ in due]
        rows = [
            sampler.row(draft[:count])
            for sampler, (_, draft) in zip(samplers, due, strict=True)
            for count in range(1 + len(draft))
        ]
        pending = self._pending = self._choosing.begin(due, rows, logits)
        drafts = plan.drafts or self._scheduler.may_draft  # from tokens that are known
        if self._overlaps and not drafts and pending.chosen is not None:
            pending.leave(pending.chosen)
        else:
            self._settle()

    def _settle(self) -> set[Sequence]:
        """Wait for the tokens that were chosen last, and give them to their sequences.

        Returns those of which the device had another token.
        """
        again: set[Sequence] = set()
        pending, self._pending = self._pending, None
        if pending is None:
            return again
        outputs = self._choosing.finish(pending)
        for sequence, draft in pending.due:
            following = list(itertools.islice(outputs, 1 + len(draft)))
            running = self._running.get(sequence)
            if running is None:  # cancelled meanwhile
                continue
            pending.take_back(sequence)
            if any(output.choice is None or output.choice.again for output in following):
                again.add(sequence)
            if draft:
                self._verify(running, draft, following)
            elif sequence.reused and not following[0].is_finite:
                self._restart(sequence)
            else:
                is_finite = self._end_prompt(running)
                self._advance(running, following[0], is_finite=is_finite)
        return again

    def _end_prompt(self, running: RunningRequest) -> bool:
        """Count the prompt of a sequence that gets its first token; return whether its scores are finite."""
        sequence = running.sequence
        if len(sequence.ids) != sequence.prompt_tokens:
            return True
        self._prompt_tokens += sequence.prompt_tokens
        self._cached_tokens += sequence.reused
        running.handle.note_cached(sequence.reused)
        return running.note_scores()

    def _verify(self, running: RunningRequest, draft: tuple[int, ...], outputs: list[RowOutput]) -> None:
        """Give one sequence its next token, and one more for each draft token that was chosen before it."""
        sequence, accepted = running.sequence, 0
        self._drafted_tokens += len(draft)
        if not all(output.is_finite for output in outputs):
            self._retry_without_draft(sequence)
            return
        self._advance(running, outputs[0])
        while sequence in self._running and accepted < len(draft) and sequence.ids[-1] == draft[accepted]:
            # an accepted token was run with its draft, so it is in the cache
            accepted, sequence.filled = accepted + 1, sequence.filled + 1
            output = outputs[accepted]
            if output.logits is not None:
                row = running.sampler.row()
                (choice,) = self._choosing.choose(output.logits.unsqueeze(0), [row])
                output = RowOutput(row, choice)
            self._advance(running, output)
        sequence.lookup.record(drafted=len(draft), accepted=accepted, length=len(sequence.ids))
        self._accepted_tokens += accepted

    def _retry_without_draft(self, sequence: Sequence) -> None:
        """Undo a drafted step whose output has NaN or Inf: without a draft it shows where that comes from.

        A wrong draft token can cause it for the tokens before it: masked out, it still counts 0 times NaN.
        """
        sequence.draft_until = 0
        sequence.filled -= 1
        self._runner.clear(sequence, sequence.filled)

    def _restart(self, sequence: Sequence) -> None:
        """Compute a sequence alone whose output has NaN or Inf and which has reused keys and values.

        They may be another's fault: in a chunk, a token with NaN spoils those before it, masked out as it is.
        """
        self._runner.clear(sequence)
        self._scheduler.restart(sequence)

    def _advance(self, running: RunningRequest, output: RowOutput, *, is_finite: bool = True) -> None:
        """Give one sequence its next token, or end it; what fails here ends that one alone."""
        if output.choice is None:
            self._end_for_memory(running.sequence, "sampling", len(running.sequence.ids))
            return
        if not (output.choice.finite and is_finite):
            self._end_invalid(running)
            return
        try:
            token = running.sampler.take(output.row, output.choice)
        except Exception as error:  # on the host, from one sequence's constraint and bans
            if is_out_of_memory(error):
                self._end_for_memory(running.sequence, "sampling", len(running.sequence.ids))
            else:
                self._end(running, failures.of(error))
            return
        self._give(running, token)

    def _give(self, running: RunningRequest, token: Token) -> None:
        """Post `token`, and end the answer where it must end."""
        sampling, sequence = running.handle.request.sampling, running.sequence
        if not sampling.max_new_tokens:
            self._end(running, "length")
            return
        if token.id is None or token.id in sampling.stop_ids:
            self._end(running, ended_by(token))
            return
        sequence.ids.append(token.id)
        running.handle.post(token)
        new_tokens = len(sequence.ids) - sequence.prompt_tokens
        if new_tokens >= sampling.max_new_tokens or len(sequence.ids) >= self.context_tokens:
            self._end(running, "length")

    def _end(self, running: RunningRequest, end: End) -> None:
        del self._running[running.sequence]
        self._scheduler.release(running.sequence)
        self._queue.finish(running.handle, end)

    def _end_invalid(self, running: RunningRequest) -> None:
        """End a sequence whose logits are not finite, and leave nothing of it in the pool."""
        log.error("Request %s: the model's output contains NaN or Inf", running.handle.request.id)
        self._runner.clear(running.sequence)
        running.sequence.filled = 0
        self._end(running, failures.invalid_output())

    def _fail(self, error: Exception) -> None:
        """Answer the requests that a failed step cost: all of them, as nothing says which one it was."""
        lost, self._pending = list(self._running.values()), None
        failure: Failure = failures.failed()
        if self._rank is not None and is_out_of_memory(error):
            failure = failures.out_of_memory()
            log.error("%s", failures.rank_out_of_memory(0, error))
        else:
            log.error("A step of %d sequences failed in the engine", len(lost), exc_info=error)
        self._scheduler.invalidate(everything=True)
        self._scheduler.take_moves()
        for running in lost:
            running.sequence.filled = 0  # what the step left in the cache cannot be trusted
            self._end(running, failure)
        if self._rank is not None:  # the other processes may be at another step by now
            self.abort()
        else:
            self._count_failure()

    def _count_failure(self) -> None:
        """Count a step that no request explains the failure of, and give up after several in a row."""
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW and self._queue.is_open:
            log.critical("%d steps failed one after another; the engine stops", self._failures)
            self._queue.abort(failures.stopped())


def _pool_size(model: "PreTrainedModel", limits: EngineLimits) -> PoolSize:
    """Return the size of the pool: as stated, else for all sequences at their longest."""
    rows, context = limits.max_sequences, limits.context_tokens
    positions = limits.positions or tuple(
        rows * (context if window is None else min(context, window_span(window)))
        for window in LayerKinds.of(model.config).windows
    )
    return PoolSize(rows, context, positions)


def _scheduler(size: PoolSize, windows: tuple[int | None, ...], limits: EngineLimits) -> Scheduler:
    return Scheduler(
        [ArenaSize(*each) for each in zip(size.positions, windows, strict=True)],
        max_sequences=limits.max_sequences,
        chunk_tokens=CHUNK_TOKENS,
        prefill_only_tokens=PREFILL_ONLY_TOKENS,
        draft_tokens=limits.draft_tokens,
    )
