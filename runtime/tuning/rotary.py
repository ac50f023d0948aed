"""Rotary embeddings as one autograd operation, in place of the one that a family's module defines.

Same formula as transformers', which spells it as eight operations whose intermediate results autograd
keeps. B batch, H heads, T tokens, D head dim, R turned features. Start at `rotating`.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"
"""What transformers calls it in every family's module."""


@contextlib.contextmanager
def rotating(model: nn.Module) -> Iterator[None]:
    """Within: rotary embeddings of `model`'s family are turned in one operation, where it has the usual ones.

    Families call a function of their module, so that one is replaced, for this process.
    """
    sources = {type(module).__module__ for module in model.modules()}
    homes = [vars(sys.modules[name]) for name in sorted(sources) if name in sys.modules]
    replaced = [(home, home[ROTARY]) for home in homes if ROTARY in home and _rotates(home[ROTARY])]
    for home, _ in replaced:
        home[ROTARY] = rotate
    try:
        yield
    finally:
        for home, original in replaced:
            home[ROTARY] = original


def _rotates(original: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether `original` does what `rotate` does, on random input."""
    if list(inspect.signature(original).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    made = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
    queries, keys, cos, sin = (torch.randn(shape, generator=made) for shape in shapes)
    turned = rotate(queries, keys, cos, sin)
    pairs = zip(original(queries, keys, cos, sin), turned, strict=True)
    return all(torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5) for theirs, ours in pairs)


def rotate(
    queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return `queries` and `keys` (B, H, T, D) turned by cos and sin (B, T, R); features after R stay."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(queries, cos, sin), _Rotate.apply(keys, cos, sin)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradient, *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Return x · cos + rotate_half(x) · sin, or with `back` that map's transpose.

    rotate_half(x) is (-x2, x1); cos and sin need not be alike in both halves.
    """
    width = cos.shape[-1]
    half = width // 2
    out = torch.empty_like(x)
    first, second, low, high = x[..., :half], x[..., half:width], sin[..., :half], sin[..., half:]
    if back:
        low, high = -high, -low
    torch.mul(first, cos[..., :half], out=out[..., :half]).addcmul_(second, low, value=-1)
    torch.mul(second, cos[..., half:], out=out[..., half:width]).addcmul_(first, high)
    if x.shape[-1] > width:
        out[..., width:] = x[..., width:]
    return out
