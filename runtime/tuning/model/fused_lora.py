"""Linear layers with LoRA adapters as one autograd operation: those of one input together, and gated MLPs.

Written out, the backward pass needs no sums of partial input gradients, no copies, and half of the saved
activations; products with the adapters' A matrices are one for all layers of an input. Same mathematics as
peft's layers. Does not know models. T tokens, r rank, I inner width of an MLP. Start
at `FusedProjections`, `run_mlp`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import silu


def fuse(model: nn.Module) -> int:
    """Let plain LoRA layers of `model` add their update in one operation; return how many do.

    Variants (DoRA), biased updates and layers that are no linear ones stay as peft has them.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_plain(layer)]
    for layer in layers:
        layer.forward = functools.partial(lora_forward, layer)
    return len(layers)


def is_plain(layer: Any) -> bool:
    """Whether `layer` is a linear one with one adapter, whose update is scale · B · A and nothing more."""
    if not isinstance(layer, LoraLayer) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    linear: bool = isinstance(layer.get_base_layer(), nn.Linear) and name in layer.lora_B
    return linear and not layer.lora_variant and layer.lora_B[name].bias is None


def update_dtype(x: Tensor, adapter: Tensor) -> torch.dtype:
    """Return the type of an update: autocast's, or the adapter's where there is none."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else adapter.dtype


def lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
        dtype = update_dtype(base, down)
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


def can_fuse(layers: Sequence[Any]) -> bool:
    """Whether `layers` are LoRA layers that this module can write out: 4-bit or whole, without dropout."""
    return all(
        is_plain(layer)
        and type(layer.get_base_layer()) in (Linear4bit, nn.Linear)
        and isinstance(layer.lora_dropout[layer.active_adapters[0]], nn.Identity)
        for layer in layers
    )


def _ready(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether this call is one of training in one number type; others are the layers' own."""
    return (
        torch.is_grad_enabled()
        and x.dtype == update_dtype(x, _down(layers[0]))
        and not any(
            layer.disable_adapters or layer.merged or not layer.training or base_dtype(layer) != x.dtype
            for layer in layers
        )
    )


def base_dtype(layer: Any) -> torch.dtype:
    """Return the number type of the products of a LoRA layer's base."""
    base = layer.get_base_layer()
    quantised = isinstance(base, Linear4bit)
    return (base.compute_dtype or torch.float32) if quantised else base.weight.dtype


def _down(layer: Any) -> Tensor:
    return layer.lora_A[layer.active_adapters[0]].weight  # type: ignore[no-any-return]


def _up(layer: Any) -> Tensor:
    return layer.lora_B[layer.active_adapters[0]].weight  # type: ignore[no-any-return]


def _adapters(layers: Sequence[Any]) -> list[Tensor]:
    return [matrix for layer in layers for matrix in (_down(layer), _up(layer))]


@dataclass(frozen=True, slots=True)
class _Weights:
    """The layers of one input, as one pass sees them: what its backward pass will need."""

    bases: tuple[Tensor, ...]
    states: tuple[Any, ...]
    """bitsandbytes' constants of each base; None for a whole one."""
    scales: tuple[float, ...]
    ranks: list[int]

    def dense(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return a base's weights (out, in)."""
        base, state = self.bases[number], self.states[number]
        return (base if state is None else dequantize_4bit(base.view(-1, 1), state)).to(dtype)


def _project(
    layers: Sequence[Any], x: Tensor, adapters: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, _Weights]:
    """Return the layers' outputs for x (T, in), x · Aᵀ of all of them side by side, and their weights."""
    low = x @ torch.cat(tuple(adapters[::2])).to(x.dtype).t()  # (T, sum of ranks)
    ranks = [len(down) for down in adapters[::2]]
    scales = tuple(layer.scaling[layer.active_adapters[0]] for layer in layers)
    outputs = [layer.base_layer(x) for layer in layers]
    for out, part, up, scale in zip(
        outputs, torch.split(low, ranks, dim=1), adapters[1::2], scales, strict=True
    ):
        out.addmm_(part, up.to(x.dtype).t(), alpha=scale)
    bases = tuple(layer.base_layer.weight.detach() for layer in layers)
    states = tuple(getattr(layer.base_layer.weight, "quant_state", None) for layer in layers)
    return outputs, low, _Weights(bases, states, scales, ranks)


def _project_back(
    weights: _Weights,
    gradients: Sequence[Tensor],
    saved: tuple[Tensor, Tensor],
    adapters: Sequence[Tensor],
    *,
    to_x: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of x (empty unless `to_x`) and of each A and B, from those of the outputs."""
    x, low = saved
    lower = torch.empty_like(low)  # gradient of x · Aᵀ
    to_ups: list[Tensor] = []
    parts = (torch.split(lower, weights.ranks, dim=1), torch.split(low, weights.ranks, dim=1))
    for gradient, up, scale, out, part in zip(gradients, adapters[1::2], weights.scales, *parts, strict=True):
        out.copy_((gradient @ up.to(x.dtype)).mul_(scale))
        to_ups.append((gradient.t() @ part).mul_(scale).to(up.dtype))
    to_downs = torch.split(lower.t() @ x, weights.ranks)
    both = [
        matrix
        for down, to_down, to_up in zip(adapters[::2], to_downs, to_ups, strict=True)
        for matrix in (to_down.to(down.dtype), to_up)
    ]
    if not to_x:
        return x.new_empty(0), both
    total = lower @ torch.cat(tuple(adapters[::2])).to(x.dtype)
    for number, gradient in enumerate(gradients):
        total.addmm_(gradient, weights.dense(number, x.dtype))
    return total, both


@dataclass(slots=True)
class FusedProjections:
    """Layers that are called one after the other with one input: the first call computes them all."""

    layers: tuple[Any, ...]
    _input: Tensor | None = field(default=None, repr=False)
    _outputs: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def call(self, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of layer `number` for x (…, in)."""
        if x is not self._input or number not in self._outputs:
            if not _ready(self.layers, x):
                return lora_forward(self.layers[number], x, *args, **kwargs)
            outputs = _Projections.apply(x, self.layers, *_adapters(self.layers))  # type: ignore[no-untyped-call]
            self._input, self._outputs = x, dict(enumerate(outputs))
        out = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return out


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Any], *adapters: Tensor) -> tuple[Tensor, ...]:
        """x (…, in); adapters: A and B of each layer."""
        flat = x.flatten(0, -2)
        outputs, low, ctx.weights = _project(layers, flat, adapters)
        ctx.save_for_backward(flat, low, *adapters)
        ctx.shape = x.shape
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """gradients (…, out) of each layer."""
        x, low, *adapters = ctx.saved_tensors
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        needed = ctx.needs_input_grad[0]
        to_x, to_adapters = _project_back(ctx.weights, flat, (x, low), adapters, to_x=needed)
        return to_x.view(ctx.shape) if needed else None, None, *to_adapters


def run_mlp(mlp: nn.Module, inner: Sequence[Any], outer: Any, x: Tensor) -> Tensor:
    """Return outer(silu(gate) * up) for x (…, in).

    `inner` is the layers of gate and up, or the one whose output is both. Without training, `mlp`'s own way.
    """
    if not _ready((*inner, outer), x):
        return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
    return _GatedMlp.apply(x, inner, outer, *_adapters((*inner, outer)))  # type: ignore[no-any-return, no-untyped-call]


class _GatedMlp(torch.autograd.Function):
    """Keeps gate and up; the inner activation is computed again, which costs one pass over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Sequence[Any], outer: Any, *adapters: Tensor) -> Tensor:
        """x (…, in); adapters: A and B of the inner layers and of the outer one."""
        flat = x.flatten(0, -2)
        outputs, low, ctx.inner = _project(inner, flat, adapters[:-2])
        gate, up = _halves(outputs)
        (out,), outer_low, ctx.outer = _project((outer,), silu(gate).mul_(up), adapters[-2:])
        ctx.save_for_backward(flat, low, outer_low, *outputs, *adapters)
        ctx.layers, ctx.shape = len(inner), x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """gradient (…, out)."""
        x, low, outer_low, *rest = ctx.saved_tensors
        outputs, adapters = rest[: ctx.layers], rest[ctx.layers :]
        gate, up = _halves(outputs)
        active = silu(gate)
        to_inner, to_outer = _project_back(
            ctx.outer, (gradient.flatten(0, -2),), (active * up, outer_low), adapters[-2:], to_x=True
        )
        gradients = [torch.empty_like(out) for out in outputs]
        to_gate, to_up = _halves(gradients)
        torch.mul(active, to_inner, out=to_up)
        torch.ops.aten.silu_backward.grad_input(to_inner.mul_(up), gate, grad_input=to_gate)
        needed = ctx.needs_input_grad[0]
        to_x, to_adapters = _project_back(ctx.inner, gradients, (x, low), adapters[:-2], to_x=needed)
        back = to_x.view(ctx.shape) if needed else None
        return back, None, None, *to_adapters, *to_outer


def _halves(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return gate and up (T, I), of two layers or of one (T, 2 I)."""
    return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
