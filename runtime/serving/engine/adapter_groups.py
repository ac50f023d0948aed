"""The flat tokens of a step by adapter: in which products a layer computes their updates.

Shapes: `N` flat tokens, `A` adapter slots, `U` adapters used by scattered tokens, `c` tokens of the busiest
of them. Does not know layers, weights or requests. Start at `group`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOOPED = 2
"""Up to this many spans, products of their own each."""
SPAN_TOKENS = 16
"""A span of this many tokens has products of its own however many there are."""
MASKED = 24
"""Up to this many adapter slots, one product over all of them with a mask is the cheapest way."""


@dataclass(frozen=True, slots=True)
class Span:
    """Flat tokens `begin` to `end` have the adapter in `adapter_slot`."""

    adapter_slot: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Masked:
    """The first `count` tokens, run through every adapter and masked."""

    count: int
    mask: Tensor
    """(count, 1, A, 1), one where the token has the adapter."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """The first tokens, each with its own adapter in one call (kernels/)."""

    adapters: Tensor
    """(tokens,) adapter slot of each, -1 for none."""


@dataclass(frozen=True, slots=True)
class Batched:
    """Scattered tokens, gathered by adapter and padded to equal numbers."""

    adapters: Tensor
    """(U,) adapter slots."""
    gathered: Tensor
    """(U * c,) flat indices, padded with 0."""
    real: Tensor
    """Where in `gathered` is no padding."""
    tokens: Tensor
    """`gathered[real]`."""


@dataclass(frozen=True, slots=True)
class AdapterGroups:
    """The flat tokens of one step by adapter."""

    spans: tuple[Span, ...]
    """Tokens that lie together: prompt chunks, neighbouring sequences."""
    scattered: PerToken | Masked | Batched | None
    """The other tokens that have an adapter."""


def group(
    adapters: Sequence[int | None],
    *,
    adapter_slots: int,
    device: torch.device,
    dtype: torch.dtype,
    per_token: bool = False,
) -> AdapterGroups | None:
    """Group the flat tokens by adapter, given the adapter slot of each or None; None if all are None.

    With `per_token` there are kernels for scattered tokens.
    """
    spans = _spans(adapters)
    if not spans:
        return None
    small = [span for span in spans if span.end - span.begin < SPAN_TOKENS]
    large = tuple(span for span in spans if span not in small)
    if per_token and small:
        return AdapterGroups(large, PerToken(_numbers(_scattered(small))))
    if len(small) <= LOOPED:
        return AdapterGroups(tuple(spans), None)
    count = small[-1].end
    # decoding sequences come first, so scattered tokens are a beginning, unless a long prompt ends shortly
    if adapter_slots > MASKED or any(span.begin < count for span in large):
        return AdapterGroups(large, _batched(small, device))
    mask = adapter_mask(_scattered(small), adapter_slots=adapter_slots, device=device, dtype=dtype)
    return AdapterGroups(large, Masked(count, mask))


def adapter_mask(
    adapters: Sequence[int | None], *, adapter_slots: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return (tokens, 1, A, 1), one where each token has its adapter, given the slot of each or None."""
    return (_numbers(adapters)[:, None] == torch.arange(adapter_slots)).to(device, dtype)[:, None, :, None]


def _spans(adapters: Sequence[int | None]) -> list[Span]:
    """Return the spans of neighbouring tokens that have the same adapter."""
    spans: list[Span] = []
    begin, count = 0, len(adapters)
    for end in range(1, count + 1):
        adapter = adapters[begin]
        if end == count or adapters[end] != adapter:
            if adapter is not None:
                spans.append(Span(adapter, begin, end))
            begin = end
    return spans


def _scattered(spans: list[Span]) -> list[int | None]:
    """Return the adapter slot of each token up to the end of the last span; None outside the spans."""
    adapters: list[int | None] = [None] * spans[-1].end
    for span in spans:
        adapters[span.begin : span.end] = [span.adapter_slot] * (span.end - span.begin)
    return adapters


def _numbers(adapters: Sequence[int | None]) -> Tensor:
    """Return (tokens,) adapter slots, -1 for none."""
    return torch.tensor([-1 if adapter_slot is None else adapter_slot for adapter_slot in adapters])


def _batched(spans: list[Span], device: torch.device) -> Batched:
    by_adapter: dict[int, list[int]] = {}
    for span in spans:
        by_adapter.setdefault(span.adapter_slot, []).extend(range(span.begin, span.end))
    busiest = max(len(tokens) for tokens in by_adapter.values())
    gathered = [token for tokens in by_adapter.values() for token in tokens + [0] * (busiest - len(tokens))]
    real = [n * busiest + c for n, tokens in enumerate(by_adapter.values()) for c in range(len(tokens))]
    numbers = [list(by_adapter), gathered, real, [gathered[index] for index in real]]
    return Batched(*(torch.tensor(each, dtype=torch.long).to(device) for each in numbers))
