"""Linear layers with LoRA adapters as one autograd operation: those of one input together, and gated MLPs.

Fused, the backward pass needs no sums of partial input gradients, no copies, and half of the saved
activations; products with the adapters' A matrices are one for all layers of an input. Same mathematics as
peft's layers: W x + scale · B A x, A (r, in), B (out, r). Does not know models or what replaces which module.
M tokens of all rows, r rank, I inner width of an MLP. Start at `install`, `FusedProjections`, `run_mlp`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import silu

# --- which layers, in which type ---------------------------------------------------------------------


def install(model: nn.Module) -> int:
    """Let plain LoRA layers of `model` add their update in one operation; return how many do.

    Variants (DoRA), biased updates and layers that are not linear stay as peft has them.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_plain(layer)]
    for layer in layers:
        layer.forward = functools.partial(lora_forward, layer)
    return len(layers)


def is_plain(layer: Any) -> bool:
    """Whether `layer` is a linear one with one adapter, whose update is scale · B · A and nothing more."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    base = layer.get_base_layer()
    linear: bool = isinstance(base, nn.Linear) and name in layer.lora_B
    frozen = not any(weight.requires_grad for weight in base.parameters())  # not so with trained biases
    return linear and frozen and not layer.lora_variant and layer.lora_B[name].bias is None


def can_fuse(layers: Sequence[Any]) -> bool:
    """Whether `layers` can be computed together: plain LoRA layers, 4-bit or unquantised, no dropout."""
    return all(
        is_plain(layer)
        and type(layer.get_base_layer()) in (Linear4bit, nn.Linear)
        and isinstance(layer.lora_dropout[layer.active_adapters[0]], nn.Identity)
        for layer in layers
    )


def _is_fused_call(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether this call of `layers` is one of training in one number type; others are the layers' own."""
    return (
        torch.is_grad_enabled()
        and x.dtype == update_dtype(x, _lora_a(layers[0]))
        and not any(
            layer.disable_adapters or layer.merged or not layer.training or base_dtype(layer) != x.dtype
            for layer in layers
        )
    )


def update_dtype(x: Tensor, adapter: Tensor) -> torch.dtype:
    """Return the type an update is computed in: autocast's, or the adapter's where there is none."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else adapter.dtype


def base_dtype(layer: Any) -> torch.dtype:
    """Return the type that the products of a LoRA layer's base are computed in."""
    base = layer.get_base_layer()
    quantised = isinstance(base, Linear4bit)
    return (base.compute_dtype or torch.float32) if quantised else base.weight.dtype


def _lora_a(layer: Any) -> Tensor:
    return layer.lora_A[layer.active_adapters[0]].weight  # type: ignore[no-any-return]


def _lora_b(layer: Any) -> Tensor:
    return layer.lora_B[layer.active_adapters[0]].weight  # type: ignore[no-any-return]


def _adapters(layers: Sequence[Any]) -> list[Tensor]:
    """Return A and B of each layer, one after the other."""
    return [matrix for layer in layers for matrix in (_lora_a(layer), _lora_b(layer))]


# --- one layer: its update as one operation ----------------------------------------------------------


def lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the layer's output for x (…, in); by peft's own forward without gradients or adapter."""
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled():
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    (name,) = layer.active_adapters
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropped, base = layer.lora_dropout[name](x), layer.base_layer(x)
    if layer.base_layer.bias is not None and type(layer.base_layer) is not nn.Linear:
        base = base.clone()  # bitsandbytes returns a view, which autograd does not let change in place
    return _AddUpdate.apply(base, dropped, lora_a, lora_b, layer.scaling[name])  # type: ignore[no-any-return, no-untyped-call]


class _AddUpdate(torch.autograd.Function):
    """base + scale · (x Aᵀ) Bᵀ, computed in `update_dtype`."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd takes tensors one by one
        ctx: Any, base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        """base (…, out), x (…, in), lora_a (r, in), lora_b (out, r); returns base, changed in place."""
        dtype = update_dtype(base, lora_a)
        flat_x = x.flatten(0, -2).to(dtype)  # (M, in)
        x_a = flat_x @ lora_a.to(dtype).t()  # (M, r)
        ctx.save_for_backward(flat_x, x_a, lora_a, lora_b)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        flat = base.flatten(0, -2)
        if flat.dtype == dtype:
            flat.addmm_(x_a, lora_b.to(dtype).t(), alpha=scale)
        else:
            flat += (x_a @ lora_b.to(dtype).t()).mul_(scale)
        ctx.mark_dirty(base)
        return base

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """gradient (…, out) passes to base as it is."""
        flat_x, x_a, lora_a, lora_b = ctx.saved_tensors
        flat = gradient.flatten(0, -2).to(flat_x.dtype)
        grad_x_a = (flat @ lora_b.to(flat_x.dtype)).mul_(ctx.scale)  # (M, r)
        grad_x = (grad_x_a @ lora_a.to(flat_x.dtype)).view(ctx.shape).to(ctx.dtype)
        grad_a = (grad_x_a.t() @ flat_x).to(lora_a.dtype)
        grad_b = (flat.t() @ x_a).mul_(ctx.scale).to(lora_b.dtype)
        return gradient, grad_x, grad_a, grad_b, None


# --- several layers of one input ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BaseWeights:
    """The frozen side of the layers of one input: what their backward pass will need."""

    weights: tuple[Tensor, ...]
    quant_states: tuple[Any, ...]
    """bitsandbytes' constants of each weight; None for an unquantised one."""
    scales: tuple[float, ...]
    ranks: list[int]

    def dense(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return a layer's base weights (out, in)."""
        weight, state = self.weights[number], self.quant_states[number]
        return (weight if state is None else dequantize_4bit(weight.view(-1, 1), state)).to(dtype)


@dataclass(frozen=True, slots=True)
class _Projected:
    """What the forward pass of the layers of one input computed."""

    outputs: list[Tensor]
    """(M, out) of each layer."""
    x_a: Tensor
    """(M, sum of ranks): x · Aᵀ of all layers side by side."""
    base: _BaseWeights


@dataclass(frozen=True, slots=True)
class _Saved:
    """The activations that the backward pass of the layers of one input needs."""

    x: Tensor
    """(M, in)"""
    x_a: Tensor
    """(M, sum of ranks)"""


def _project(layers: Sequence[Any], x: Tensor, adapters: Sequence[Tensor]) -> _Projected:
    """Compute the layers' outputs for x (M, in); `adapters` are A and B of each."""
    x_a = x @ torch.cat(tuple(adapters[::2])).to(x.dtype).t()
    ranks = [len(lora_a) for lora_a in adapters[::2]]
    scales = tuple(layer.scaling[layer.active_adapters[0]] for layer in layers)
    outputs = [layer.base_layer(x) for layer in layers]
    parts = torch.split(x_a, ranks, dim=1)
    for out, part, lora_b, scale in zip(outputs, parts, adapters[1::2], scales, strict=True):
        out.addmm_(part, lora_b.to(x.dtype).t(), alpha=scale)
    weights = tuple(layer.base_layer.weight.detach() for layer in layers)
    states = tuple(getattr(layer.base_layer.weight, "quant_state", None) for layer in layers)
    return _Projected(outputs, x_a, _BaseWeights(weights, states, scales, ranks))


def _project_back(
    base: _BaseWeights,
    gradients: Sequence[Tensor],
    saved: _Saved,
    adapters: Sequence[Tensor],
    *,
    needs_grad_x: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of x (empty unless needed) and of each A and B, from those of the outputs."""
    x, x_a = saved.x, saved.x_a
    grad_x_a = torch.empty_like(x_a)
    grad_bs: list[Tensor] = []
    parts = (torch.split(grad_x_a, base.ranks, dim=1), torch.split(x_a, base.ranks, dim=1))
    for gradient, lora_b, scale, out, part in zip(
        gradients, adapters[1::2], base.scales, *parts, strict=True
    ):
        out.copy_((gradient @ lora_b.to(x.dtype)).mul_(scale))
        grad_bs.append((gradient.t() @ part).mul_(scale).to(lora_b.dtype))
    grad_as = torch.split(grad_x_a.t() @ x, base.ranks)
    grad_adapters = [
        matrix
        for lora_a, grad_a, grad_b in zip(adapters[::2], grad_as, grad_bs, strict=True)
        for matrix in (grad_a.to(lora_a.dtype), grad_b)
    ]
    if not needs_grad_x:
        return x.new_empty(0), grad_adapters
    grad_x = grad_x_a @ torch.cat(tuple(adapters[::2])).to(x.dtype)
    for number, gradient in enumerate(gradients):
        grad_x.addmm_(gradient, base.dense(number, x.dtype))
    return grad_x, grad_adapters


@dataclass(slots=True)
class FusedProjections:
    """Layers that are called one after the other with one input: the first call computes them all."""

    layers: tuple[Any, ...]
    _input: Tensor | None = field(default=None, repr=False)
    _outputs: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def call(self, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of layer `number` for x (…, in)."""
        if x is not self._input or number not in self._outputs:
            if not _is_fused_call(self.layers, x):
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
        projected = _project(layers, flat, adapters)
        ctx.save_for_backward(flat, projected.x_a, *adapters)
        ctx.base, ctx.shape = projected.base, x.shape
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in projected.outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """gradients (…, out) of each layer."""
        x, x_a, *adapters = ctx.saved_tensors
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        needed = ctx.needs_input_grad[0]
        grad_x, grad_adapters = _project_back(ctx.base, flat, _Saved(x, x_a), adapters, needs_grad_x=needed)
        return grad_x.view(ctx.shape) if needed else None, None, *grad_adapters


# --- a gated MLP -------------------------------------------------------------------------------------


def run_mlp(mlp: nn.Module, inner: Sequence[Any], outer: Any, x: Tensor) -> Tensor:
    """Return outer(silu(gate) * up) for x (…, in).

    `inner` is the layers of gate and up, or the one whose output is both. Without training, by the forward
    of `mlp`'s class.
    """
    if not _is_fused_call((*inner, outer), x):
        return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
    return _GatedMlp.apply(x, inner, outer, *_adapters((*inner, outer)))  # type: ignore[no-any-return, no-untyped-call]


class _GatedMlp(torch.autograd.Function):
    """Keeps gate and up; the inner activation is computed again, which costs one pass over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Sequence[Any], outer: Any, *adapters: Tensor) -> Tensor:
        """x (…, in); adapters: A and B of the inner layers and of the outer one."""
        flat = x.flatten(0, -2)
        projected = _project(inner, flat, adapters[:-2])
        gate, up = _halves(projected.outputs)
        last = _project((outer,), silu(gate).mul_(up), adapters[-2:])
        (out,) = last.outputs
        ctx.save_for_backward(flat, projected.x_a, last.x_a, *projected.outputs, *adapters)
        ctx.inner, ctx.outer = projected.base, last.base
        ctx.layers, ctx.shape = len(inner), x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """gradient (…, out)."""
        x, x_a, outer_x_a, *rest = ctx.saved_tensors
        outputs, adapters = rest[: ctx.layers], rest[ctx.layers :]
        gate, up = _halves(outputs)
        active = silu(gate)
        grad_inner, grad_outer = _project_back(
            ctx.outer,
            (gradient.flatten(0, -2),),
            _Saved(active * up, outer_x_a),  # not kept beyond this call: it is as large as gate
            adapters[-2:],
            needs_grad_x=True,
        )
        gradients = [torch.empty_like(out) for out in outputs]
        grad_gate, grad_up = _halves(gradients)
        torch.mul(active, grad_inner, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_gate)
        needed = ctx.needs_input_grad[0]
        grad_x, grad_adapters = _project_back(
            ctx.inner, gradients, _Saved(x, x_a), adapters[:-2], needs_grad_x=needed
        )
        return grad_x.view(ctx.shape) if needed else None, None, None, *grad_adapters, *grad_outer


def _halves(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return gate and up (M, I), of two layers or of one (M, 2 I)."""
    return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
