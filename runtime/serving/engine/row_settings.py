"""The settings of a step's rows as tensors on their device, made anew only when the rows are others.

`n`, `C` rows: drawn in one way, all of them. `V` the vocabulary. Token ids that the model does
not have are left out here: none can be chosen. Does not know logits. Start at `RowSettings`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.serving.engine.penalties import Penalties
from runtime.serving.engine.random_streams import uniform
from runtime.serving.engine.sampler import Row, Sampler
from runtime.serving.engine.truncation import SHORTLIST, Cut
from runtime.transfers import to_device


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """The rows of a step that are drawn in one way."""

    members: tuple[int, ...]
    """Which of the step's rows."""
    index: Tensor | None
    """The same (n,) on the device; None where they are all rows."""
    temperature: Tensor
    """(n, 1) float32."""
    cut: Cut
    most: int
    """Tokens that are ranked."""
    keys: NDArray[np.uint64]
    """Of the streams of random numbers."""

    def uniform(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        """Return the random numbers (n, 1) float64 of its `rows`, which are some of the step's."""
        positions = np.array([rows[member].position for member in self.members], np.uint64)
        return to_device(torch.from_numpy(uniform(self.keys, positions)).unsqueeze(1), device)


class RowSettings:
    """The settings of some rows, in their order."""

    def __init__(self, rows: Sequence[Row], vocabulary: int, device: torch.device) -> None:
        self._made_for = _identity(rows)
        self._has_drafts = any(row.supposed for row in rows)
        samplers = [row.sampler for row in rows]
        self.bias = _bias(samplers, vocabulary, device)
        """Flat indices into (C, V) and what is added there; None where no row has any."""
        self.penalties = Penalties(rows, vocabulary, device) if Penalties.are_needed(rows) else None
        self.draws = _draws(samplers, vocabulary, device)
        reporting = [n for n, each in enumerate(samplers) if each.sampling.top_logprobs is not None]
        self.alternatives = max((samplers[n].sampling.top_logprobs or 0 for n in reporting), default=None)
        """Most alternatives that a row reports; None where no row reports log probabilities."""

    def are_of(self, rows: Sequence[Row]) -> bool:
        """Whether these are the settings of `rows`."""
        return not self._has_drafts and self._made_for == _identity(rows)


def flat_indices(rows: Sequence[tuple[int, Tensor]], vocabulary: int, device: torch.device) -> Tensor | None:
    """Return the indices into flattened (C, V) of (row, ids), ids that the model does not have left out."""
    flat = [ids[(ids >= 0) & (ids < vocabulary)] + row * vocabulary for row, ids in rows]
    return to_device(torch.cat(flat), device) if flat else None


def _identity(rows: Sequence[Row]) -> list[tuple[Sampler, bool]]:
    return [(row.sampler, row.sampler.full_rankings > 0) for row in rows]


def _index(members: Sequence[int], rows: int, device: torch.device) -> Tensor | None:
    return None if len(members) == rows else to_device(torch.tensor(members), device)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype).unsqueeze(1), device)


def _bias(samplers: list[Sampler], vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    added = [
        (row * vocabulary + token, bias)
        for row, sampler in enumerate(samplers)
        for token, bias in sampler.sampling.logit_bias.items()
        if 0 <= token < vocabulary
    ]
    if not added:
        return None
    flat, values = zip(*added, strict=True)
    return to_device(torch.tensor(flat), device), to_device(torch.tensor(values, dtype=torch.float32), device)


def _draws(samplers: list[Sampler], vocabulary: int, device: torch.device) -> tuple[DrawSettings, ...]:
    """Return the rows that draw: those that keep every token, and by how many tokens are ranked."""
    by_most: dict[int, list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.sampling.temperature > 0:
            by_most.setdefault(_most(sampler, vocabulary), []).append(row)
    return tuple(
        _draw_settings(samplers, members, most=most, vocabulary=vocabulary, device=device)
        for most, members in by_most.items()
    )


def _most(sampler: Sampler, vocabulary: int) -> int:
    """Return how many tokens are ranked for a row; 0 where it keeps all."""
    sampling = sampler.sampling
    limited = 0 < sampling.top_k < vocabulary
    if not limited and sampling.top_p >= 1 and sampling.min_p <= 0:
        return 0
    if sampler.full_rankings or (limited and sampling.top_k > SHORTLIST):
        return vocabulary
    return min(SHORTLIST, vocabulary)


def _draw_settings(
    samplers: list[Sampler], members: list[int], *, most: int, vocabulary: int, device: torch.device
) -> DrawSettings:
    rows = [samplers[member].sampling for member in members]
    top_k = [row.top_k if 0 < row.top_k < vocabulary else 0 for row in rows]
    top_p = [row.top_p if row.top_p < 1 else torch.inf for row in rows]
    min_p = [row.min_p for row in rows]
    return DrawSettings(
        tuple(members),
        _index(members, len(samplers), device),
        _column([row.temperature for row in rows], torch.float32, device),
        Cut(
            _column(top_k, torch.int64, device) if any(top_k) else None,
            _column(top_p, torch.float64, device) if min(top_p) < 1 else None,
            _column(min_p, torch.float64, device) if any(min_p) else None,
        ),
        most,
        np.array([samplers[member].key for member in members], np.uint64),
    )
