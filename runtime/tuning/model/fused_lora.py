"""Linear layers with LoRA adapters as one autograd operation: those of one input together, and gated MLPs.

Fused, the backward pass needs no sums of partial input gradients, no copies, and half of the saved
activations; products with the adapters' A matrices are one for all layers of an input. Same mathematics as
peft's layers: W x + scale · B A x, A (r, in), B (out, r). Does not know models or what replaces which module;
the matrices in the compute type are adapter_matrices.py's. M tokens of all rows, r rank, I inner width of an
MLP. Start at `install`, `FusedProjections`, `run_mlp`.
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

from runtime.tuning.model.adapter_matrices import (
    AdapterGroup,
    AdapterMatrices,
    grads_of_a,
    masters,
    wide_product,
)

# --- which layers, in which type ---------------------------------------------------------------------


def install(model: nn.Module) -> int:
    """Let plain LoRA layers of `model` add their update in one operation; return how many do.

    Variants (DoRA), biased updates and layers that are not linear stay as peft has them.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_plain(layer)]
    for layer in layers:
        layer.forward = functools.partial(lora_forward, AdapterGroup((layer,), whole=can_fuse((layer,))))
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
        and x.dtype == update_dtype(x, masters(layers)[0])
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


# --- one layer: its update as one operation ----------------------------------------------------------


def lora_forward(group: AdapterGroup, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the output of the layer in `group` for x (…, in); by peft's own forward without gradients."""
    (layer,) = group.layers
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled():
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    if group.whole and _is_fused_call(group.layers, x):
        (out,) = _Projections.apply(x, group, *masters(group.layers))  # type: ignore[no-untyped-call]
        return out  # type: ignore[no-any-return]
    (name,) = layer.active_adapters
    dropped, base = layer.lora_dropout[name](x), layer.base_layer(x)
    if layer.base_layer.bias is not None and type(layer.base_layer) is not nn.Linear:
        base = base.clone()  # bitsandbytes returns a view, which autograd does not let change in place
    return _AddUpdate.apply(base, dropped, group, *masters(group.layers))  # type: ignore[no-any-return, no-untyped-call]


class _AddUpdate(torch.autograd.Function):
    """base + scale · (x Aᵀ) Bᵀ, computed in `update_dtype`."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd takes tensors one by one
        ctx: Any, base: Tensor, x: Tensor, group: AdapterGroup, lora_a: Tensor, lora_b: Tensor
    ) -> Tensor:
        """base (…, out), x (…, in), lora_a (r, in), lora_b (out, r); returns base, changed in place."""
        dtype = update_dtype(base, lora_a)
        own = group.matrices(dtype)
        flat_x = x.flatten(0, -2).to(dtype)  # (M, in)
        x_a = flat_x @ own.a.t()  # (M, r)
        ctx.save_for_backward(flat_x, x_a, own.a, *own.bs)
        ctx.scales, ctx.shape, ctx.dtype = own.scales, x.shape, x.dtype
        flat = base.flatten(0, -2)
        if flat.dtype == dtype:
            flat.addmm_(x_a, own.bs[0].t())
        else:
            flat += x_a @ own.bs[0].t()
        ctx.mark_dirty(base)
        return base

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        """gradient (…, out) passes to base as it is."""
        flat_x, x_a, a, b = ctx.saved_tensors
        flat = gradient.flatten(0, -2).to(flat_x.dtype)
        grad_x_a = flat @ b  # (M, r)
        grad_x = (grad_x_a @ a).view(ctx.shape).to(ctx.dtype)
        (grad_a,) = grads_of_a(grad_x_a, flat_x, ctx.scales, [len(a)])
        return gradient, grad_x, None, grad_a, wide_product(flat.t(), x_a)


# --- several layers of one input ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BaseWeights:
    """The frozen side of the layers of one input: what their backward pass will need."""

    weights: tuple[Tensor, ...]
    quant_states: tuple[Any, ...]
    """bitsandbytes' constants of each weight; None for an unquantised one."""

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
    """What the backward pass of the layers of one input needs."""

    x: Tensor
    """(M, in)"""
    x_a: Tensor
    """(M, sum of ranks)"""
    adapters: AdapterMatrices


def _project(layers: Sequence[Any], x: Tensor, adapters: AdapterMatrices) -> _Projected:
    """Compute the layers' outputs for x (M, in)."""
    x_a = x @ adapters.a.t()
    outputs = [layer.base_layer(x) for layer in layers]
    parts = torch.split(x_a, adapters.ranks, dim=1)
    for out, part, b in zip(outputs, parts, adapters.bs, strict=True):
        out.addmm_(part, b.t())
    weights = tuple(layer.base_layer.weight.detach() for layer in layers)
    states = tuple(getattr(layer.base_layer.weight, "quant_state", None) for layer in layers)
    return _Projected(outputs, x_a, _BaseWeights(weights, states))


def _project_back(
    base: _BaseWeights, gradients: Sequence[Tensor], saved: _Saved, *, needs_grad_x: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of x (empty unless needed) and of each A and B, from those of the outputs."""
    x, adapters = saved.x, saved.adapters
    grad_x_a = torch.empty_like(saved.x_a)
    grad_bs: list[Tensor] = []
    parts = (torch.split(each, adapters.ranks, dim=1) for each in (grad_x_a, saved.x_a))
    for gradient, b, out, part in zip(gradients, adapters.bs, *parts, strict=True):
        torch.mm(gradient, b, out=out)
        grad_bs.append(wide_product(gradient.t(), part))
    grad_as = grads_of_a(grad_x_a, x, adapters.scales, adapters.ranks)
    grad_adapters = [each for pair in zip(grad_as, grad_bs, strict=True) for each in pair]
    if not needs_grad_x:
        return x.new_empty(0), grad_adapters
    grad_x = grad_x_a @ adapters.a
    for number, gradient in enumerate(gradients):
        grad_x.addmm_(gradient, base.dense(number, x.dtype))
    return grad_x, grad_adapters


@dataclass(slots=True)
class FusedProjections:
    """Layers that are called one after the other with one input: the first call computes them all."""

    group: AdapterGroup
    _input: Tensor | None = field(default=None, repr=False)
    _outputs: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def call(self, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of layer `number` for x (…, in)."""
        if x is not self._input or number not in self._outputs:
            layers = self.group.layers
            if not _is_fused_call(layers, x):
                return lora_forward(AdapterGroup((layers[number],)), x, *args, **kwargs)
            outputs = _Projections.apply(x, self.group, *masters(layers))  # type: ignore[no-untyped-call]
            self._input, self._outputs = x, dict(enumerate(outputs))
        out = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return out


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AdapterGroup, *trained: Tensor) -> tuple[Tensor, ...]:
        """x (…, in); trained: A and B of each layer, which the gradients are for."""
        flat, own = x.flatten(0, -2), group.matrices(x.dtype)
        projected = _project(group.layers, flat, own)
        ctx.save_for_backward(flat, projected.x_a, own.a, *own.bs)
        ctx.base, ctx.scales, ctx.ranks, ctx.shape = projected.base, own.scales, own.ranks, x.shape
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in projected.outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """gradients (…, out) of each layer."""
        x, x_a, a, *bs = ctx.saved_tensors
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        needed = ctx.needs_input_grad[0]
        saved = _Saved(x, x_a, AdapterMatrices(a, tuple(bs), ctx.scales, ctx.ranks))
        grad_x, grad_adapters = _project_back(ctx.base, flat, saved, needs_grad_x=needed)
        return grad_x.view(ctx.shape) if needed else None, None, *grad_adapters


def adapter_groups(model: nn.Module) -> list[AdapterGroup]:
    """Return the groups that training passes of `model` compute; each adapter is in one of them."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    calls = [forward for forward in forwards if isinstance(forward, functools.partial)]
    together: dict[int, AdapterGroup] = {}
    alone: list[AdapterGroup] = []
    for call in calls:
        owner = getattr(call.func, "__self__", None)
        own = [owner.group] if isinstance(owner, FusedProjections) else call.args
        found = [group for group in own if isinstance(group, AdapterGroup)]
        if call.func is lora_forward:
            alone += found
        else:
            together |= {id(group): group for group in found}
    covered = {id(layer) for group in together.values() for layer in group.layers}
    return [*together.values(), *(group for group in alone if id(group.layers[0]) not in covered)]


# --- a gated MLP -------------------------------------------------------------------------------------


def run_mlp(mlp: nn.Module, inner: AdapterGroup, outer: AdapterGroup, x: Tensor) -> Tensor:
    """Return outer(silu(gate) * up) for x (…, in).

    `inner` is the layers of gate and up, or the one whose output is both. Without training, by the forward
    of `mlp`'s class.
    """
    layers = (*inner.layers, *outer.layers)
    if not _is_fused_call(layers, x):
        return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
    return _GatedMlp.apply(x, inner, outer, *masters(layers))  # type: ignore[no-any-return, no-untyped-call]


class _GatedMlp(torch.autograd.Function):
    """Keeps gate and up; the inner activation is computed again, which costs one pass over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: AdapterGroup, outer: AdapterGroup, *trained: Tensor) -> Tensor:
        """x (…, in); trained: A and B of the inner layers and of the outer one."""
        flat, ours, last = x.flatten(0, -2), inner.matrices(x.dtype), outer.matrices(x.dtype)
        projected = _project(inner.layers, flat, ours)
        gate, up = _halves(projected.outputs)
        behind = _project(outer.layers, silu(gate).mul_(up), last)
        (out,) = behind.outputs
        ctx.save_for_backward(
            flat, projected.x_a, behind.x_a, ours.a, last.a, *last.bs, *ours.bs, *projected.outputs
        )
        ctx.inner, ctx.outer, ctx.shape = projected.base, behind.base, x.shape
        ctx.scales, ctx.ranks = (ours.scales, last.scales), (ours.ranks, last.ranks)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """gradient (…, out)."""
        x, x_a, outer_x_a, a, outer_a, outer_b, *rest = ctx.saved_tensors
        count = len(ctx.ranks[0])
        ours = AdapterMatrices(a, tuple(rest[:count]), ctx.scales[0], ctx.ranks[0])
        last = AdapterMatrices(outer_a, (outer_b,), ctx.scales[1], ctx.ranks[1])
        outputs = rest[count:]
        gate, up = _halves(outputs)
        active = silu(gate)
        # not kept beyond this call: it is as large as gate
        behind = _Saved(active * up, outer_x_a, last)
        grad_inner, grad_outer = _project_back(
            ctx.outer, (gradient.flatten(0, -2),), behind, needs_grad_x=True
        )
        del behind
        gradients = [torch.empty_like(out) for out in outputs]
        grad_gate, grad_up = _halves(gradients)
        torch.mul(active, grad_inner, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_gate)
        needed = ctx.needs_input_grad[0]
        grad_x, grad_adapters = _project_back(ctx.inner, gradients, _Saved(x, x_a, ours), needs_grad_x=needed)
        return grad_x.view(ctx.shape) if needed else None, None, None, *grad_adapters, *grad_outer


def _halves(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return gate and up (M, I), of two layers or of one (M, 2 I)."""
    return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
