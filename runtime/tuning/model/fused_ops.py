"""Puts fused operations in place of a model's own where they compute the same: rotary, norms, MLPs, LoRA.

A module is recognised by its parts, and one of each class is compared with the original on random input
before any of that class is replaced: a family whose formula differs keeps its own. Does not know families
by name. B rows, T tokens, H heads, D head dim, R rotated features of it, E width of the hidden states.
Start at `install`; rotary embeddings are replaced by `fused_rotary` while training runs.
"""

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.tuning.model import fused_lora, fused_loss
from runtime.tuning.model.adapter_matrices import AdapterGroup

log = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"
"""What transformers calls it in every family's module."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the comparison, relative to the largest value: another formula is off by far more."""


@dataclass(frozen=True, slots=True)
class FusedCandidate:
    """A module, what could be its forward, and the width and type of its input."""

    module: nn.Module
    forward: Callable[..., Tensor]
    features: int
    dtype: torch.dtype


def install(adapted: Any) -> None:
    """Fuse LoRA layers, MLPs, norms and the output layer of a PeftModel, each where it can be."""
    fused_lora.install(adapted)
    counts = {"MLPs": 0, "norms": 0, "shared inputs": 0}
    equal: dict[type, bool] = {}
    for module in adapted.modules():
        for kind, candidate_of in (("MLPs", _mlp_candidate), ("norms", _norm_candidate)):
            candidate = candidate_of(module)
            if candidate is None:
                continue
            if type(module) not in equal:
                equal[type(module)] = _equals_original(candidate)
            if equal[type(module)]:
                module.forward = candidate.forward
                counts[kind] += 1
        counts["shared inputs"] += _fuse_projections(module)
    loss = fused_loss.install(adapted.get_base_model())
    log.debug("fused operations: %s, loss in the output layer: %s", counts, loss)


def _mlp_candidate(module: nn.Module) -> FusedCandidate | None:
    """Return the fused forward of a gated SiLU MLP."""
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    names = ("gate_proj", "up_proj") if hasattr(module, "gate_proj") else ("gate_up_proj",)
    layers: list[Any] = [getattr(module, name, None) for name in (*names, "down_proj")]
    if len(list(module.children())) != len(layers) + 1 or not fused_lora.can_fuse(layers):
        return None
    inner, outer = AdapterGroup(layers[:-1]), AdapterGroup(layers[-1:])
    forward = functools.partial(fused_lora.run_mlp, module, inner, outer)
    return FusedCandidate(module, forward, layers[0].in_features, fused_lora.base_dtype(layers[0]))


def _norm_candidate(module: nn.Module) -> FusedCandidate | None:
    """Return the fused forward of an RMS norm."""
    weight: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    return FusedCandidate(module, functools.partial(rms_norm, module), len(weight), weight.dtype)


def _fuse_projections(module: nn.Module) -> bool:
    """Let the query, key and value projections of an attention compute together."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not fused_lora.can_fuse(layers):
        return False
    fused = fused_lora.FusedProjections(AdapterGroup(layers))
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(fused.call, number)  # type: ignore[union-attr]
    return True


def _equals_original(candidate: FusedCandidate) -> bool:
    """Whether the candidate computes what its class does, on random input."""
    module = candidate.module
    generator = torch.Generator().manual_seed(0)
    device = next(module.parameters()).device
    x = torch.randn(3, candidate.features, generator=generator).to(device, candidate.dtype)
    half = candidate.dtype != torch.float32
    was_training = module.training
    module.train()
    with torch.enable_grad(), torch.autocast(device.type, candidate.dtype if half else None, enabled=half):
        ours = candidate.forward(x.requires_grad_()).detach().float()
        with torch.no_grad():
            theirs = type(module).forward(module, x).float()
    module.train(was_training)
    equal = float((ours - theirs).abs().max()) <= TOLERANCE[candidate.dtype] * float(theirs.abs().max())
    if not equal:
        log.debug("%s computes another formula than its parts suggest: kept", type(module).__name__)
    return equal


@contextlib.contextmanager
def fused_rotary(model: nn.Module) -> Iterator[None]:
    """Within: rotary embeddings of `model`'s family are one operation, where it has the usual ones.

    Families call a function of their module, so that one is replaced, for this process.
    """
    names = {type(module).__module__ for module in model.modules()}
    sources = [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules]
    replaced = [
        (source, source[ROTARY]) for source in sources if ROTARY in source and _is_usual(source[ROTARY])
    ]
    for source, _ in replaced:
        source[ROTARY] = apply_rotary
    try:
        yield
    finally:
        for source, original in replaced:
            source[ROTARY] = original


def _is_usual(original: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether `original` computes what `apply_rotary` does, on random input."""
    if list(inspect.signature(original).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
    queries, keys, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    rotated = apply_rotary(queries, keys, cos, sin)
    pairs = zip(original(queries, keys, cos, sin), rotated, strict=True)
    return all(torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5) for theirs, ours in pairs)


def apply_rotary(
    queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return `queries` and `keys` (B, H, T, D) rotated by cos and sin (B, T, R); features after R stay."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(queries, cos, sin), _Rotary.apply(keys, cos, sin)  # type: ignore[no-untyped-call]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, transposed=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(gradient, *ctx.saved_tensors, transposed=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    """Return x · cos + rotate_half(x) · sin, or with `transposed` that map's transpose.

    rotate_half(x) is (-x2, x1); cos and sin need not be alike in both halves.
    """
    width = cos.shape[-1]
    half = width // 2
    out = torch.empty_like(x)
    first, second, low, high = x[..., :half], x[..., half:width], sin[..., :half], sin[..., half:]
    if transposed:
        low, high = high, low
    sign = 1 if transposed else -1
    torch.mul(x[..., :width], cos, out=out[..., :width])
    out[..., :half].addcmul_(second, low, value=sign)
    out[..., half:width].addcmul_(first, high, value=-sign)
    if x.shape[-1] > width:
        out[..., width:] = x[..., width:]
    return out


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """Return weight * x / rms(x) for x (…, E); by the module's own forward where its weight is trained."""
    if not torch.is_grad_enabled() or module.weight.requires_grad:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    function = _RmsNorm if x.device.type == "cpu" else _RmsNormOnGpu
    return function.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNormOnGpu(torch.autograd.Function):
    """By torch's kernel without a weight: the originals round to x's type before they multiply by theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x (…, E)."""
        normal, inverse = torch.ops.aten._fused_rms_norm(x, weight.shape, None, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = weight * normal
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient (…, E)."""
        x, weight, inverse = ctx.saved_tensors
        scaled = (gradient * weight).to(x.dtype)
        found = torch.ops.aten._fused_rms_norm_backward(scaled, x, weight.shape, inverse, None, [True, False])
        return found[0], None, None


class _RmsNorm(torch.autograd.Function):
    """On a CPU, where torch has no kernel. In float32 and returned in x's type, as the originals are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x (…, E)."""
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
        """gradient (…, E)."""
        x, weight, inverse = ctx.saved_tensors
        wide = x.float()
        scaled = gradient.float() * weight
        along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1)  # (…, 1)
        along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None
