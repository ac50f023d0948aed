"""How the next token is chosen from one sequence's logits; pure but for the sequence's random generator.

The order is that of transformers' generate: penalties and bias, bans, then temperature, then truncation. `V`
is the vocabulary. Does not know models or batches: a choice depends on the past of its sequence alone, so it
is the same alone and among others. Start at `Sampler.choose`.
"""

import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Sampling, Token
from runtime.serving.engine.token_bans import TokenBans

SHORTLIST = 256
"""Truncation looks at this many of the likeliest tokens first: sorting a vocabulary takes milliseconds."""
SMALLEST_PENALTY = 1e-30
"""Repetition penalties below this would be 0 in float32, or make infinities of logits."""


class Sampler:
    """The sampling state of one request: its prompt, what was generated, and its random generator."""

    def __init__(self, sampling: Sampling, prompt_ids: tuple[int, ...]) -> None:
        self.sampling = sampling
        self.generated: list[int] = []
        self._prompt = torch.tensor(prompt_ids, dtype=torch.long)
        self._mask = sampling.grammar.begin() if sampling.grammar is not None else None
        self._bans = TokenBans(sampling, prompt_ids) if TokenBans.needed(sampling) else None
        self._likeliest = self._bans is None and _takes_likeliest(sampling)
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed & (1 << 63) - 1)

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the likeliest one, and nothing else is wanted."""
        return self._likeliest and not self._is_early

    @property
    def _is_early(self) -> bool:
        """Whether the answer may not end yet."""
        sampling = self.sampling
        return len(self.generated) < sampling.min_new_tokens and bool(sampling.stop_ids)

    def accept(self, token: int) -> Token:
        """Append a token that was chosen elsewhere, the likeliest one of an `is_greedy` sequence."""
        self.generated.append(token)
        return Token(token)

    def choose(self, logits: Tensor) -> Token:
        """Return the next token for `logits` (V,) float32 on the CPU, and append it.

        Raises RequestError when the request allows no token at all.
        """
        sampling = self.sampling
        scores = self._adjusted(logits)
        best, likeliest = scores.max(dim=-1)
        if best == -torch.inf:
            raise RequestError("no token is left that this request allows: its bans exclude all of them")
        if sampling.temperature == 0:
            chosen = int(likeliest)
        else:
            # below the best one: divided by a small temperature, the scores themselves would overflow
            chosen = self._draw((scores - best) / sampling.temperature)
        self.generated.append(chosen)
        if self._bans is not None:
            self._bans.push(chosen)
        if self._mask is not None:
            self._mask.take(chosen)
        if sampling.top_logprobs is None:
            return Token(chosen)
        return _with_logprobs(chosen, logits, sampling.top_logprobs)

    def _draw(self, scores: Tensor) -> int:
        """Draw a token of `scores` (V,) by its probability among those that are kept."""
        short = shortlist(scores, self.sampling)
        ids, kept = short if short is not None else (None, truncate(scores, self.sampling))
        reached = kept.softmax(-1).cumsum(-1, dtype=torch.float64)
        point = torch.rand(1, generator=self._random, dtype=torch.float64) * reached[-1]
        # right: a token of probability 0 reaches no further than the one before, and is never drawn
        index = min(int(torch.searchsorted(reached, point, right=True)), len(kept) - 1)
        return index if ids is None else int(ids[index])

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Return a copy of `logits` (V,) with penalties, bias and bans; the same tensor without any."""
        sampling = self.sampling
        past = torch.tensor(self.generated, dtype=torch.long)
        scores = logits
        if sampling.repetition_penalty != 1.0:
            scores = penalise_repetition(scores, torch.cat((self._prompt, past)), sampling.repetition_penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and self.generated:
            seen, counts = torch.unique(past, return_counts=True)
            penalty = sampling.presence_penalty + sampling.frequency_penalty * counts
            scores = scores.index_add(0, seen, -penalty.to(scores.dtype))
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
            scores = scores.index_add(
                0, ids, torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype)
            )
        if self._bans is not None:
            scores = self._bans.apply(scores)
        if self._is_early:
            scores = scores.index_fill(0, torch.tensor(sorted(sampling.stop_ids)), -torch.inf)
        return scores if self._mask is None else forbid(scores, self._mask.allowed())


def _takes_likeliest(sampling: Sampling) -> bool:
    """Return whether `sampling` always takes the likeliest token and reports nothing else."""
    changed = (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sampling.grammar is not None
    )
    return sampling.temperature == 0 and sampling.top_logprobs is None and not changed


def forbid(scores: Tensor, allowed: bytes) -> Tensor:
    """Return `scores` (V,) with minus infinity where `allowed`, one byte per token id, is 0 or has ended."""
    keep = torch.zeros(scores.shape[0], dtype=torch.bool)
    known = torch.frombuffer(bytearray(allowed), dtype=torch.uint8)[: scores.shape[0]]
    keep[: known.shape[0]] = known != 0
    return scores.masked_fill(~keep, -torch.inf)


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return `scores` (V,) with the ids in `seen` made less likely (CTRL, arXiv:1909.05858, section 4.1)."""
    ids = torch.unique(seen)
    values, penalty = scores[ids], max(penalty, SMALLEST_PENALTY)
    penalised = torch.where(values < 0, values * penalty, values / penalty)
    most = torch.finfo(scores.dtype).max
    return scores.index_copy(0, ids, torch.where(values.isinf(), values, penalised.clamp(-most, most)))


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return `scores` (V,) with minus infinity where top_k, top_p or min_p drop; the likeliest stays."""
    if 0 < sampling.top_k < scores.shape[0]:
        lowest = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(descending=True)
        shares = ordered.softmax(-1)
        outside = shares.cumsum(-1) - shares >= sampling.top_p  # the mass before a token is already enough
        outside[0] = False
        scores = scores.index_fill(0, order[outside], -torch.inf)
    if sampling.min_p > 0.0:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < sampling.min_p * shares.max(), -torch.inf)
    return scores


def shortlist(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor] | None:
    """Return ids and scores (C,) that `truncate` keeps, likeliest first; None if SHORTLIST may be too few."""
    values, ids = scores.topk(min(SHORTLIST, scores.shape[0]))
    complete = len(values) == len(scores)
    total = scores.logsumexp(-1)
    if 0 < sampling.top_k < scores.shape[0]:
        if not complete and (sampling.top_k > len(values) or values[sampling.top_k - 1] == values[-1]):
            return None
        values = values[values >= values[sampling.top_k - 1]]
        complete, total = True, values.logsumexp(-1)
    if sampling.top_p < 1.0:
        shares = (values - total).exp()
        inside = shares.cumsum(-1) - shares < sampling.top_p
        inside[0] = True
        complete = complete or not bool(inside[-1])
        values = values[inside]
    if sampling.min_p > 0.0:
        inside = (values - values[0]).exp() >= sampling.min_p
        complete = complete or not bool(inside[-1])
        values = values[inside]
    return (ids[: len(values)], values) if complete else None


def _with_logprobs(chosen: int, logits: Tensor, alternatives: int) -> Token:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(alternatives, logprobs.shape[0]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, logprob=float(logprobs[chosen]), top=top)
