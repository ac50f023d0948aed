"""Adds a LoRA update to a layer's output in one operation.

peft spells it as a copy, two products, a scaling and a sum, and autograd keeps and runs each backwards: four
passes over every layer's output more than needed. Same mathematics on any device and any base layer.
Does not know models. B·T rows, r rank. Start at `fuse`.
"""

import functools
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def fuse(model: nn.Module) -> int:
    """Let plain LoRA layers of `model` add their update in one operation; return how many do.

    Variants (DoRA), biased updates and layers that are no linear ones stay as peft has them.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_plain(layer)]
    for layer in layers:
        layer.forward = functools.partial(forward, layer)
    return len(layers)


def is_plain(layer: Any) -> bool:
    """Whether `layer` is a linear one with one adapter, whose update is scale · B · A and nothing more."""
    if not isinstance(layer, LoraLayer) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    linear: bool = isinstance(layer.get_base_layer(), nn.Linear) and name in layer.lora_B
    return linear and not layer.lora_variant and layer.lora_B[name].bias is None


def compute_type(x: Tensor, adapter: Tensor) -> torch.dtype:
    """Return the type of an update: autocast's, or the adapter's where there is none."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else adapter.dtype


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the layer's output for x (…, features); peft's own way without gradients or without adapter."""
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled():
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    fed = layer.lora_dropout[name](x)
    return _AddUpdate.apply(layer.base_layer(x), fed, down, up, layer.scaling[name])  # type: ignore[no-any-return, no-untyped-call]


class _AddUpdate(torch.autograd.Function):
    """base + scale · (x downᵀ) upᵀ, computed in autocast's type, or in the adapter's where there is none."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, *update: Any) -> Tensor:
        """base (…, out), x (…, in); update: down (r, in), up (out, r), scale."""
        down, up, scale = update
        dtype = compute_type(base, down)
        rows = x.flatten(0, -2).to(dtype)
        low = rows @ down.to(dtype).t()  # (B·T, r)
        ctx.save_for_backward(rows, low, down, up)
        ctx.scale, ctx.x = scale, (x.shape, x.dtype)
        flat = base.flatten(0, -2)
        if flat.dtype == dtype:
            flat.addmm_(low, up.to(dtype).t(), alpha=scale)
        else:
            flat += (low @ up.to(dtype).t()).mul_(scale)
        ctx.mark_dirty(base)
        return base

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """gradient (…, out) passes to base as it is."""
        rows, low, down, up = ctx.saved_tensors
        shape, kind = ctx.x
        flat = gradient.flatten(0, -2).to(rows.dtype)
        lower = (flat @ up.to(rows.dtype)).mul_(ctx.scale)  # (B·T, r)
        to_x = (lower @ down.to(rows.dtype)).view(shape).to(kind)
        to_down = (lower.t() @ rows).to(down.dtype)
        to_up = (flat.t() @ low).mul_(ctx.scale).to(up.dtype)
        return gradient, to_x, to_down, to_up, None
