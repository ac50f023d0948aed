"""RMS norms as one autograd operation, with few passes over their inputs.

Same formula as transformers', which spells it as seven operations whose intermediate results autograd
keeps. Does not know models. Start at `norm`.
"""

from typing import Any

import torch
from torch import Tensor


def norm(module: Any, x: Tensor) -> Tensor:
    """Return weight * x / rms(x) for x (…, features); the module's own way where its weight learns."""
    if not torch.is_grad_enabled() or module.weight.requires_grad:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class _Norm(torch.autograd.Function):
    """Computed in float32 and returned in x's type, as the originals do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x (…, features)."""
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, weight, inverse)
        normal: Tensor = wide * inverse
        if x.dtype == weight.dtype == torch.float32:
            return normal.mul_(weight)
        return weight * normal.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient (…, features)."""
        x, weight, inverse = ctx.saved_tensors
        wide = x.float()
        scaled = gradient.float() * weight
        along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1)  # (…, 1)
        along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None
