"""The flat tokens of a step by adapter: in which products a layer computes their updates.

A layer reads the adapters that the step uses, however many are loaded. Tokens that lie together have products
of their own; scattered ones are multiplied each with its own adapter, gathered by its slot. No product mixes
adapters, so NaN in one stays in the rows of its own tokens. Does not know layers, weights or requests. Start
at `group`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_ADAPTER = 0
"""The slot of tokens without an adapter: its weights are zeros."""
LOOPED = 2
"""Up to this many spans have products of their own, which read each adapter once, where it lies."""
SPAN_TOKENS = 16
"""Tokens whose gathered adapters cost as much as the products of one more span.

A span's products are 2 launches or more, about 10 us. To gather T adapters of b bytes moves 3 T b bytes, most
of them within a GPU's second cache: at 5 TB/s, and b = 0.4 to 1.2 MB a layer (rank 16, 3.8B to 8B), 0.25 to
0.7 us a token. On a CPU products of a span that long are faster than the kernel for single tokens.
"""


@dataclass(frozen=True, slots=True)
class Span:
    """Flat tokens `begin` to `end` have the adapter in `adapter_slot`."""

    adapter_slot: int
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """How many they are."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class AdapterGroups:
    """The flat tokens of one step by adapter."""

    spans: tuple[Span, ...]
    """Tokens that lie together: prompt chunks, neighbouring sequences."""
    scattered: Tensor | None
    """(tokens,) the adapter slot of each of the first tokens, NO_ADAPTER for none."""


def group(adapters: Sequence[int], *, device: torch.device, per_token: bool = False) -> AdapterGroups | None:
    """Group the flat tokens by adapter, given the adapter slot of each; None if no token has one.

    With `per_token` there are kernels for scattered tokens.
    """
    spans = _spans(adapters)
    if not spans:
        return None
    if per_token:
        short = [span for span in spans if span.tokens < SPAN_TOKENS]
        return AdapterGroups(tuple(span for span in spans if span not in short), _slots(short, device))
    gathered = max(
        (number for number, span in enumerate(spans, 1) if span.end <= SPAN_TOKENS * number), default=0
    )
    if gathered <= LOOPED:
        gathered = 0
    return AdapterGroups(tuple(spans[gathered:]), _slots(spans[:gathered], device))


def _spans(adapters: Sequence[int]) -> list[Span]:
    """Return the spans of neighbouring tokens that have the same adapter."""
    spans: list[Span] = []
    begin, count = 0, len(adapters)
    for end in range(1, count + 1):
        if end == count or adapters[end] != adapters[begin]:
            if adapters[begin] != NO_ADAPTER:
                spans.append(Span(adapters[begin], begin, end))
            begin = end
    return spans


def _slots(spans: Sequence[Span], device: torch.device) -> Tensor | None:
    """Return the adapter slot of each token up to the end of the last span; None without spans."""
    if not spans:
        return None
    slots = [NO_ADAPTER] * spans[-1].end
    for span in spans:
        slots[span.begin : span.end] = [span.adapter_slot] * span.tokens
    return torch.tensor(slots).to(device, non_blocking=True)
