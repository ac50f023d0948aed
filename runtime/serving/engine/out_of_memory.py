"""What is done when a pass runs out of memory: smaller passes, and a refusal where the smallest fails too.

Prompt chunks take the most memory, and less the shorter they are. So a pass is divided until it runs, which
ends at one sequence with FLOOR_TOKENS of its prompt: that one asked for too much, and nobody else loses
anything. What did not fit is remembered for a while. Knows plans, not models. Start at `divide`.
"""

import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from runtime.errors import Failure
from runtime.serving.engine import failures
from runtime.serving.engine.scheduler import PromptChunk, StepPlan

log = logging.getLogger(__name__)

FLOOR_TOKENS = 32
"""Prompt tokens of one sequence that are not divided further."""
REMEMBER_S = 600.0
"""How long no pass is as large as one that failed."""
LINES = 30
"""Log lines in LOG_S; further ones are counted, and the next says how many."""
LOG_S = 60.0

Reason = Literal["divided", "prompt", "decode", "sampling", "adapter"]
"""What ran out: a pass that was then divided, or what was refused."""


def free_memory(device: torch.device) -> None:
    """Give back what allocators keep of memory that is free, after a pass on `device` that ran out of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(AttributeError):  # glibc's: other C libraries keep less
        ctypes.CDLL(None).malloc_trim(0)


def divide(plan: StepPlan) -> tuple[StepPlan, ...]:
    """Return smaller plans for what `plan` runs, or as much of its prompts as fits; none of the smallest."""
    if plan.chunks and (plan.decode or plan.drafts):
        return replace(plan, chunks=()), replace(plan, decode=(), drafts=())
    tokens = prompt_tokens(plan)
    if tokens > FLOOR_TOKENS:
        return (_begin(plan, max(FLOOR_TOKENS, tokens // 2)),)
    if len(plan.chunks) > 1:
        return tuple(StepPlan((), (chunk,)) for chunk in plan.chunks)
    if plan.drafts:
        return (StepPlan((*plan.decode, *(draft.sequence for draft in plan.drafts)), ()),)
    if len(plan.decode) > 1:
        half = len(plan.decode) // 2
        return replace(plan, decode=plan.decode[:half]), replace(plan, decode=plan.decode[half:])
    return ()


def prompt_tokens(plan: StepPlan) -> int:
    """Return how many tokens of prompts `plan` runs."""
    return sum(chunk.count for chunk in plan.chunks)


def _begin(plan: StepPlan, tokens: int) -> StepPlan:
    """Return the first `tokens` of the prompt tokens of `plan`."""
    chunks: list[PromptChunk] = []
    for chunk in plan.chunks:
        if tokens > 0:
            chunks.append(replace(chunk, count=min(chunk.count, tokens)))
            tokens -= chunks[-1].count
    return StepPlan((), tuple(chunks))


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """At most `tokens` of prompts run in a pass that reads `reach` positions of a sequence, or more."""

    reach: int
    tokens: int
    until_s: float


class MemoryLimits:
    """What lately ran out of memory, and so how much a pass may run; one engine's, used on its thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: dict[str, int] = dict.fromkeys(("divided", "prompt", "decode", "sampling", "adapter"), 0)
        """How often, by `Reason`; read from any thread."""
        self._clock = clock
        self._prompts: list[PromptLimit] = []
        self._rows, self._rows_until_s = sys.maxsize, 0.0
        self._logged, self._silent, self._log_until_s = 0, 0, 0.0

    @property
    def prompt_tokens(self) -> int:
        """The least number of prompt tokens that a pass is limited to now; 0 without a limit."""
        now = self._clock()
        return min((limit.tokens for limit in self._prompts if now < limit.until_s), default=0)

    def most_tokens(self, reach: int) -> int:
        """Return how many prompt tokens may run in a pass that reads `reach` positions of a sequence."""
        if not self._prompts:
            return sys.maxsize
        now = self._clock()
        self._prompts = [limit for limit in self._prompts if now < limit.until_s]
        return min((limit.tokens for limit in self._prompts if limit.reach <= reach), default=sys.maxsize)

    def within(self, plan: StepPlan) -> tuple[StepPlan, ...]:
        """Return `plan`, in several where fewer sequences may decode at once than it has."""
        rows = self._rows if self._clock() < self._rows_until_s else sys.maxsize
        if len(plan.decode) <= rows:
            return (plan,)
        parts = [plan.decode[begin : begin + rows] for begin in range(0, len(plan.decode), rows)]
        return *(StepPlan(part, ()) for part in parts[:-1]), replace(plan, decode=parts[-1])

    def lower(self, plan: StepPlan, *, decode_fits: bool) -> None:
        """Remember that `plan` did not fit; `decode_fits` where what it decodes did without its prompts."""
        self.counts["divided"] += 1
        for draft in plan.drafts:
            draft.sequence.draft_until = 0
        if plan.chunks and (decode_fits or not plan.decode):
            reach = max(chunk.end for chunk in plan.chunks)
            self.lower_prompt(prompt_tokens(plan), reach)
        elif len(plan.decode) > 1 and not plan.chunks:
            self._rows, self._rows_until_s = (len(plan.decode) + 1) // 2, self._clock() + REMEMBER_S
            self._log(
                f"Out of memory with {len(plan.decode)} sequences that decode: at most {self._rows} in a "
                f"pass for {REMEMBER_S / 60:.0f} minutes"
            )

    def lower_prompt(self, tokens: int, reach: int) -> None:
        """Remember that `tokens` of prompts, which read up to `reach` positions, did not fit."""
        allowed = max(FLOOR_TOKENS, tokens // 2)
        if self.most_tokens(reach) <= allowed:
            return
        self._prompts = [each for each in self._prompts if each.reach < reach or each.tokens < allowed]
        self._prompts.append(PromptLimit(reach, allowed, self._clock() + REMEMBER_S))
        self._log(
            f"Out of memory with {tokens} prompt tokens that read up to {reach} positions: at most {allowed} "
            f"in such a pass for {REMEMBER_S / 60:.0f} minutes"
        )

    def refuse(self, request_id: str, reason: Reason, *, tokens: int) -> Failure:
        """Return the failure of a request whose smallest pass, up to its `tokens`-th token, did not fit."""
        self.counts[reason] += 1
        failure = failures.needs_too_much_memory(tokens) if is_explained(tokens) else failures.out_of_memory()
        self._log(
            f"Request {request_id} is refused: out of memory at its token {tokens} ({reason}); lower "
            "limits.rows or limits.context_tokens if this recurs"
        )
        return failure

    def _log(self, line: str) -> None:
        now = self._clock()
        if now >= self._log_until_s:
            self._logged, self._log_until_s = 0, now + LOG_S
        if self._logged >= LINES:
            self._silent += 1
            return
        more = f" (and {self._silent} such lines that were not logged)" if self._silent else ""
        log.warning("%s%s", line, more)
        self._logged, self._silent = self._logged + 1, 0


def is_explained(tokens: int) -> bool:
    """Whether a request's length explains that it ran out of memory at its `tokens`-th token."""
    return tokens > FLOOR_TOKENS
