"""Choosing one row's token in plain torch, step by step as transformers' generate does: the reference.

Slow and obvious. Bans and constraints are not in it: test_token_bans.py compares those with generate.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.serving.engine.protocol import Sampling
from runtime.serving.engine.sampling import SMALLEST_PENALTY


def adjust(logits: Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Return `logits` (V,) with penalties and bias."""
    scores = logits.clone()
    most = torch.finfo(scores.dtype).max
    if sampling.repetition_penalty != 1:
        penalty = max(sampling.repetition_penalty, SMALLEST_PENALTY)
        for token in {*prompt, *generated}:
            value = scores[token]
            if not value.isinf():
                scores[token] = (value * penalty if value < 0 else value / penalty).clamp(-most, most)
    for token, count in Counter(generated).items():
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * torch.tensor(count)
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    return scores


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return `scores` (V,) with minus infinity where top_k, top_p or min_p drop; the likeliest stays."""
    if 0 < sampling.top_k < scores.shape[0]:
        lowest = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        shares = ordered.double().softmax(-1)
        outside = shares.cumsum(-1) - shares >= sampling.top_p  # the mass before a token is already enough
        outside[0] = False
        scores = scores.index_fill(0, order[outside], -torch.inf)
    if sampling.min_p > 0.0:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < sampling.min_p * shares.max(), -torch.inf)
    return scores


def distribution(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (V,) float64 that a token of `scores` is drawn with."""
    scaled = (scores - scores.max()) / sampling.temperature
    return truncate(scaled, sampling).double().softmax(-1)
