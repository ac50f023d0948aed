"""LoRA's A and B in the type they are computed in: cast once per optimizer step for all passes and layers.

The trained weights are float32, and a product needs them in the type of its other side. Within `held` each is
cast once, in a handful of operations for the whole model; elsewhere each call casts its own. Gradients go to
the float32 weights either way. Does not know how layers are fused. M tokens, r rank. Start at `AdapterGroup`
and `held`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdapterMatrices:
    """The adapters of the layers of one input, in the compute type."""

    a: Tensor
    """(sum of ranks, in): scale · A of each layer, one below the other."""
    bs: tuple[Tensor, ...]
    """B (out, r) of each layer."""
    scales: tuple[float, ...]
    ranks: list[int]


class AdapterGroup:
    """Plain LoRA layers of one input, whose adapters are computed together."""

    def __init__(self, layers: Sequence[Any], *, whole: bool = False) -> None:
        self.layers = tuple(layers)
        self.whole = whole
        """Whether base and adapter of a layer by itself can be one operation."""
        self.held: AdapterMatrices | None = None

    def matrices(self, dtype: torch.dtype) -> AdapterMatrices:
        """Return the adapters in `dtype`: those that are held, where they are in it."""
        if self.held is not None and self.held.a.dtype == dtype:
            return self.held
        return _cast([self], dtype)[0]


def masters(layers: Iterable[Any]) -> list[Tensor]:
    """Return the trained A and B of each layer, one after the other."""
    return [
        getattr(layer, which)[layer.active_adapters[0]].weight
        for layer in layers
        for which in ("lora_A", "lora_B")
    ]


@contextlib.contextmanager
def held(groups: Sequence[AdapterGroup], dtype: torch.dtype) -> Iterator[None]:
    """Within: the adapters of `groups` are in `dtype` once; their trained weights must not change."""
    for group, matrices in zip(groups, _cast(groups, dtype), strict=True):
        group.held = matrices
    try:
        yield
    finally:
        for group in groups:
            group.held = None


@torch.no_grad()
def _cast(groups: Sequence[AdapterGroup], dtype: torch.dtype) -> list[AdapterMatrices]:
    """Return the adapters of all `groups`, by a few operations over all of them."""
    found: list[AdapterMatrices] = []
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    scaled: dict[int, float] = {}
    for group in groups:
        trained = masters(group.layers)
        first, ranks = trained[0], [len(a) for a in trained[::2]]
        scales = tuple(float(layer.scaling[layer.active_adapters[0]]) for layer in group.layers)
        stacked = torch.empty(sum(ranks), first.shape[1], dtype=dtype, device=first.device)
        bs = tuple(torch.empty_like(b, dtype=dtype) for b in trained[1::2])
        found.append(AdapterMatrices(stacked, bs, scales, ranks))
        parts = torch.split(stacked, ranks)
        scaled |= {len(sources) + number: scale for number, scale in enumerate(scales) if scale != 1.0}
        targets += [*parts, *bs]
        sources += [*trained[::2], *trained[1::2]]
    if scaled:  # before they are rounded
        products = torch._foreach_mul([sources[number] for number in scaled], list(scaled.values()))
        for number, product in zip(scaled, products, strict=True):
            sources[number] = product
    if targets:
        torch._foreach_copy_(targets, sources)
    return found


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left · right as the gradient of a trained weight: not rounded to two bytes on a GPU.

    It adds up in float32 anyway. What comes in another type than the weight's is converted by autograd.
    """
    if left.device.type == "cpu" or left.element_size() != 2:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def grads_of_a(grad_x_a: Tensor, x: Tensor, scales: Sequence[float], ranks: list[int]) -> tuple[Tensor, ...]:
    """Return the gradient of each layer's A, from that of x · scale · Aᵀ (M, sum of ranks) and x (M, in)."""
    stacked = wide_product(grad_x_a.t(), x)
    parts = torch.split(stacked, ranks)
    if len(set(scales)) == 1:
        if scales[0] != 1.0:
            stacked.mul_(scales[0])
    else:
        for part, scale in zip(parts, scales, strict=True):
            part.mul_(scale)
    return parts
