"""The continuous-batching engine: one model, one thread, many rows, an adapter per row.

Knows token ids and rows. Does not know HTTP, chat templates or files (bank.py reads adapters). Read
`BatchingEngine.step` first: admit, run, choose, answer.
"""

import itertools
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.errors import ConfigError, RequestError, UnavailableError
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
"""Prompt tokens run beside decoding rows in one step: more is faster, fewer is smoother (RESULTS.md)."""
ALONE_TOKENS = 512
"""Prompt tokens run in one step when no row waits for its next token."""
FAILURES_IN_A_ROW = 3
"""Steps that fail one after another before the engine gives up, so that a restart can help."""


class RunningRequest:
    """A row's request, its sampling, and who reads."""

    __slots__ = ("row", "sampler", "ticket")

    def __init__(self, ticket: RequestHandle, row: Sequence) -> None:
        self.ticket, self.row = ticket, row
        self.sampler = Sampler(ticket.request.sampling, ticket.request.prompt_ids)


class BatchingEngine:
    """Serves `rows` requests at a time in one thread; more wait in order of arrival."""

    def __init__(  # noqa: PLR0913 - numbers of one server
        self,
        model: "PreTrainedModel",
        *,
        rows: int,
        context_tokens: int,
        queue: int,
        guess_tokens: int = 0,
        rank: Rank | None = None,
        graph_backend: GraphBackend | None = None,
    ) -> None:
        """Guesses up to `guess_tokens` of a row's next tokens (guess.py); records steps with `graph_backend`.

        `rank` where `model` is rank 0's shard of one that several processes serve.
        """
        self.context_tokens = context_tokens
        self._rank = rank
        self._lost = False
        self._rows = rows
        self._scheduler = Scheduler(
            rows, chunk_tokens=CHUNK_TOKENS, alone_tokens=ALONE_TOKENS, guess_tokens=guess_tokens
        )
        self._desk = RequestQueue(rows=rows, queue=queue, adapters=lambda: self._runner.adapters.names)
        self._answers: dict[Sequence, RunningRequest] = {}
        self._failures = 0
        self._prompt_tokens = self._cached_tokens = self._guessed_tokens = self._right_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._desk.errand(lambda: self._prepare(model, graph_backend))
            undo.pop_all()

    def _prepare(self, model: "PreTrainedModel", graph_backend: GraphBackend | None) -> None:
        self._runner = ModelRunner(
            model,
            slots=self._rows,
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
        return self._desk.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._desk.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read an adapter; see `Engine.add_adapter`."""
        self._desk.errand(lambda: self._add(name, folder, strength))

    def _add(self, name: str, folder: Path, strength: float) -> None:
        if name in self._runner.adapters.names:
            raise ConfigError(f"adapter {name}: is resident already; remove it first")
        self._runner.add_adapter(name, folder, strength)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter once nobody uses it; see `Engine.remove_adapter`."""
        self._desk.let_go(name)
        self._desk.errand(lambda: self._scheduler.forget(self._runner.remove_adapter(name)))
        self._desk.forgotten(name)

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        return Stats(
            running=self._desk.running,
            waiting=self._desk.waiting,
            kv_cache_share=self._scheduler.used_tokens / (self._rows * self.context_tokens),
            last_progress_s=self._desk.last_progress_s,
            alive=self._thread.is_alive() and not self._lost,
            adapters=self._desk.adapters(),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            guessed_tokens=self._guessed_tokens,
            right_tokens=self._right_tokens,
        )

    def close(self) -> None:
        """Stop the thread after the step it is at; everything in flight ends as cancelled."""
        self._desk.close("cancelled")
        # an interpreter that ends while the thread is inside torch aborts the process
        self._thread.join(LAST_STEP_S)
        if self._rank is not None:
            self._rank.wait()

    def _run(self) -> None:
        while self._desk.is_open:
            try:
                self.step()
            except Exception as error:  # the thread answers its requests and lives on
                self._fail(error)
        for answer in tuple(self._answers.values()):
            self._end(answer, "cancelled")
        if self._rank is not None and not self._lost:
            self._rank.group.broadcast(Stop())

    def lose(self) -> None:
        """Another rank of the group is gone: fail what is in flight, and give up."""
        self._lost = True
        self._desk.abandon(UnavailableError("the engine has stopped"))

    def step(self) -> None:
        """Admit who waits, run one step of all rows, and give each its next token; waits when idle."""
        self._admit(self._desk.take(wait=not self._answers))
        self._drop_cancelled()
        if not self._answers:
            return
        plan = self._scheduler.plan()
        logits = self._runner.run(plan)
        self._scheduler.ran(plan)
        self._desk.progress()
        self._failures = 0
        self._choose(plan, logits)

    def _admit(self, tickets: list[RequestHandle]) -> None:
        for ticket in tickets:
            request = ticket.request
            version = self._runner.adapters.version(request.adapter)
            # decided once, so that no answer changes midway; the last token is chosen and never run
            most = min(len(request.prompt_ids) + request.sampling.max_new_tokens, self.context_tokens)
            # a pass over several tokens rounds otherwise, and a draw near an edge shows it; a seed promises
            repeatable = request.sampling.seed is not None and request.sampling.temperature > 0
            row = self._scheduler.admit(
                request.prompt_ids,
                adapter=version,
                guess_until=0 if repeatable else most,
                long=self._runner.is_long(most - 1),
            )
            self._answers[row] = RunningRequest(ticket, row)

    def _drop_cancelled(self) -> None:
        for answer in [each for each in self._answers.values() if each.ticket.cancelled]:
            self._end(answer, "cancelled")

    def _choose(self, plan: StepPlan, logits: Tensor) -> None:
        """Give every row of `plan` that is due its tokens; logits (C, V) in the plan's order."""
        due: list[tuple[Sequence, tuple[int, ...]]] = [(row, ()) for row in plan.decode]
        due += [(guess.row, guess.guesses) for guess in plan.ahead]
        due += [(chunk.row, ()) for chunk in plan.chunks if chunk.completes]
        if not due:
            return
        highest, likeliest = logits.max(dim=-1)  # a row with NaN or Inf anywhere shows it here
        drawing = any(not self._answers[row].sampler.is_greedy for row, _ in due)
        host = logits.float().cpu() if drawing else logits
        places = zip(highest.isfinite().tolist(), likeliest.tolist(), host, strict=True)
        for row, guesses in due:
            answer = self._answers[row]
            if len(row.ids) == row.prompt_tokens:
                self._prompt_tokens += row.prompt_tokens
                self._cached_tokens += row.reused
                answer.ticket.found(row.reused)
            own = list(itertools.islice(places, 1 + len(guesses)))
            self._guessed_tokens += len(guesses)
            if guesses and not all(sane for sane, *_ in own):
                self._retract(row)
                continue
            self._advance(answer, own[0])
            right = 0
            while row in self._answers and right < len(guesses) and row.ids[-1] == guesses[right]:
                right, row.filled = right + 1, row.filled + 1  # the guess was run, so it is in the cache
                self._advance(answer, own[right])
            if guesses:
                row.guesser.learn(guessed=len(guesses), right=right, length=len(row.ids))
                self._right_tokens += right

    def _retract(self, row: Sequence) -> None:
        """Undo a step with guesses after NaN or Inf: without any it shows whose fault that was.

        A wrong guess can do that to the tokens before it: hidden from them, it still counts 0 times NaN.
        """
        row.guess_until = 0
        row.filled -= 1
        self._runner.clear(row.slot, row.filled)

    def _advance(self, answer: RunningRequest, place: tuple[bool, int, Tensor]) -> None:
        """Give one row its next token; `place`: are its logits numbers, which is likeliest, logits (V,)."""
        sane, likeliest, logits = place
        if not sane:
            self._discard(answer)
        elif answer.sampler.is_greedy:
            self._give(answer, answer.sampler.accept(likeliest))
        else:
            self._sample(answer, logits)

    def _sample(self, answer: RunningRequest, logits: Tensor) -> None:
        """Choose one row's next token; a form that asks too much ends that row alone. logits (V,)."""
        try:
            token = answer.sampler.choose(logits)
        except RequestError as failure:
            self._end(answer, failure)
            return
        self._give(answer, token)

    def _give(self, answer: RunningRequest, token: Token) -> None:
        """Post `token`, and end the answer where it must end."""
        sampling, row = answer.ticket.request.sampling, answer.row
        if token.id is None or token.id in sampling.stop_ids:
            self._end(answer, "stop")
            return
        row.ids.append(token.id)
        answer.ticket.post(token)
        if len(row.ids) - row.prompt_tokens >= sampling.max_new_tokens or len(row.ids) >= self.context_tokens:
            self._end(answer, "length")

    def _end(self, answer: RunningRequest, end: FinishReason | Exception) -> None:
        del self._answers[answer.row]
        self._scheduler.retire(answer.row)
        self._desk.finish(answer.ticket, end)

    def _discard(self, answer: RunningRequest) -> None:
        """End a row whose logits are not numbers, and leave nothing of it in the cache."""
        log.error("Request %s: the model's output is NaN or Inf", answer.ticket.request.id)
        slot = answer.row.slot
        answer.row.filled = 0
        self._end(answer, UnavailableError("the model's output is not a number for this prompt"))
        self._runner.clear(slot, 0)

    def _fail(self, error: Exception) -> None:
        """Answer the requests that a failed step cost: the newest when memory ran out, else all of them."""
        self._failures += 1
        answers = list(self._answers.values())
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            log.error("Out of GPU memory; the newest request is answered 503 and the others go on")
            reason = UnavailableError("out of GPU memory: send a shorter prompt or ask for fewer tokens")
            answers = answers[-1:]
        else:
            log.error("A step of %d rows failed in the engine", len(answers), exc_info=error)
            reason = UnavailableError("the engine failed on this request; its log says why")
            self._scheduler.forget(everything=True)
        for answer in answers:
            answer.row.filled = 0  # what the step left in the cache is not to be trusted
            self._end(answer, reason)
        if self._rank is not None:  # the others are at another place by now
            self.lose()
        elif self._failures >= FAILURES_IN_A_ROW:
            log.critical("%d steps failed one after another; the engine stops", self._failures)
            self._desk.abandon(UnavailableError("the engine has stopped"))
