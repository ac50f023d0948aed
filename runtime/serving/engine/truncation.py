"""Draws tokens from rows of scores: what top_k, top_p and min_p keep, and which of them is drawn.

A constant number of operations for any number of rows, none of which waits for the device. A row comes out
the same alone and among others: probabilities are summed as integers, whose sum does not depend on the order
in which a device adds, and equal scores are in the order of their ids. `n` rows, `K` ranked tokens, `V` the
vocabulary. Does not know requests. Start at `draw`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHORTLIST = 256
"""Truncation looks at this many of the likeliest tokens first: sorting a vocabulary takes much longer."""
UNDECIDED = -3
"""Stands for a token where more than the shortlist is needed."""
WHOLE = 2.0**50
"""The probability 1 as an integer: sums of a vocabulary stay exact in float64 too."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept of some rows, on their device; None where no row asks for it."""

    top_k: Tensor | None = None
    """(n, 1) int64; 0 keeps all."""
    top_p: Tensor | None = None
    """(n, 1) float64, infinity where everything is kept."""
    min_p: Tensor | None = None
    """(n, 1) float64; 0 keeps all."""

    @property
    def keeps_all(self) -> bool:
        """Whether no row drops anything."""
        return self.top_k is None and self.top_p is None and self.min_p is None


def draw(scores: Tensor, cut: Cut, uniform: Tensor, *, most: int) -> Tensor:
    """Return the tokens (n,) drawn by the softmax of `scores` (n, V) float32, of what `cut` keeps.

    `uniform` (n, 1) float64 is the random number in [0, 1) of each row. At most `most` tokens are ranked;
    UNDECIDED is returned for a row for which these are too few, which does not happen with V of them.
    """
    shares = scores.softmax(-1)
    if cut.keeps_all:
        reached = _integers(shares).cumsum_(-1)
        return _drawn(reached, uniform, last=reached.shape[-1] - 1).squeeze(1)
    values, ids = rank(scores, most)
    weights = _integers(shares.gather(1, ids))  # (n, K), likeliest first
    reached = weights.cumsum(-1)
    kept, decided = _kept(values, weights, reached, cut)
    last = kept.sum(-1, keepdim=True) - 1  # what is kept comes first
    tokens = ids.gather(1, _drawn(reached, uniform, last=last))
    if values.shape[1] < scores.shape[1]:
        tokens = tokens.masked_fill(~decided, UNDECIDED)
    return tokens.squeeze(1)


def rank(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest min(`most`, V) of `scores` (n, V) and their ids, equals in the order of their ids.

    Which of the tokens that equal the last one are among them is not defined.
    """
    if most >= scores.shape[1]:
        return torch.sort(scores, dim=-1, descending=True, stable=True)
    values, ids = scores.topk(most, dim=-1, sorted=False)
    ids, order = ids.sort(dim=-1)
    values, by_value = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _kept(values: Tensor, weights: Tensor, reached: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Return which ranked tokens (n, K) are kept, and (n, 1) whether that is known without further ones.

    A token without weight is never drawn, so neither is any behind the list where its last has none.
    """
    kept = torch.ones_like(weights, dtype=torch.bool)
    counted: Tensor | None = None
    total: Tensor | float = WHOLE
    if cut.top_k is not None:
        limited = cut.top_k > 0
        place = torch.where(limited, cut.top_k, values.shape[1]).clamp_(max=values.shape[1]) - 1
        kept = values >= values.gather(1, place)
        within = reached.gather(1, kept.sum(-1, keepdim=True).clamp_(min=1) - 1)
        counted, total = kept & limited, torch.where(limited, within.double(), WHOLE)
    if cut.top_p is not None:
        kept = kept & (reached - weights < cut.top_p * total)  # the mass before a token is not enough yet
    if cut.min_p is not None:
        kept = kept & (weights >= cut.min_p * weights[:, :1])
    kept[:, 0] = True  # the likeliest always is, by a top_p of 0 too
    needed = kept if counted is None else kept | counted
    at_end = (values <= values[:, -1:]) & (weights > 0)  # others that equal these may be missing
    return kept, ~(needed & at_end).any(-1, keepdim=True)


def _integers(shares: Tensor) -> Tensor:
    """Return probabilities as whole parts of WHOLE; exact, as a float32 has fewer digits."""
    return (shares * WHOLE).to(torch.int64)


def _drawn(reached: Tensor, uniform: Tensor, *, last: Tensor | int) -> Tensor:
    """Return the place (n, 1), up to `last`, at which the sums `reached` (n, K) exceed their random share."""
    total = reached[:, -1:] if isinstance(last, int) else reached.gather(1, last)
    point = (uniform * total).to(torch.int64)
    # right: a token of weight 0 reaches no further than the one before, and is never drawn
    places = torch.searchsorted(reached, point, right=True)
    return places.clamp_(max=last) if isinstance(last, int) else places.minimum(last)
