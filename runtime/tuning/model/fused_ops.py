"""Puts written-out operations in place of a model's own where they compute the same.

A module is recognised by its parts, and one of each class is compared with the original on random input
before any of that class is replaced: a family whose formula differs keeps its own. Start at `install`.
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

from runtime import families
from runtime.tuning.data.batching import IGNORE
from runtime.tuning.model import fused_lora
from runtime.tuning.model.fused_lora import fuse

CHUNK_BYTES = 128 << 20
"""Of float32 logits at a time."""


class LossHead:
    """The `forward` of an output layer: its summed loss while labels are expected, else its logits."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.labels: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.labels is None:
            return type(self.layer).forward(self.layer, hidden)
        return _Loss.apply(hidden, self.labels, self.layer.weight, self.layer.bias)  # type: ignore[no-any-return, no-untyped-call]

    @contextlib.contextmanager
    def expecting(self, labels: Tensor) -> Iterator[None]:
        """Within: the layer returns the loss of its inputs (B, N, features) against labels (B, N)."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None


def install_loss(model: Any) -> bool:
    """Let `model`'s output layer compute the loss, where its family and the layer allow; say whether."""
    layer = model.get_output_embeddings()
    plain = type(layer) is nn.Linear and not any(weight.requires_grad for weight in layer.parameters())
    if not families.find(model.config.model_type).plain_logits or not plain:
        return False
    layer.forward = LossHead(layer)
    return True


def loss_head(model: nn.Module) -> LossHead | None:
    """Return what `install_loss` put into `model`, under whatever it is wrapped in."""
    heads = (module.__dict__.get("forward") for module in model.modules())
    return next((head for head in heads if isinstance(head, LossHead)), None)


class _Loss(torch.autograd.Function):
    """Cross-entropy in float32, summed over the labels that are not IGNORE."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """hidden (B, N, features), labels (B, N)."""
        counted = labels.flatten() != IGNORE
        rows, wanted = hidden.flatten(0, -2)[counted], labels.flatten()[counted]
        needed = ctx.needs_input_grad[0]
        to_rows = torch.empty_like(rows) if needed else None
        total = torch.zeros((), device=hidden.device)
        size = max(1, CHUNK_BYTES // 4 // len(weight))
        logits = torch.empty(min(size, len(rows)), len(weight), device=hidden.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            total += _chunk(rows[part], wanted[part], weight, bias, logits)
            if to_rows is not None:
                to_rows[part] = logits[: len(rows[part])].to(weight.dtype) @ weight
        if to_rows is not None:
            ctx.save_for_backward(to_rows, counted)
            ctx.shape = hidden.shape
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """gradient () of the sum."""
        to_rows, counted = ctx.saved_tensors
        whole = to_rows.new_zeros(ctx.shape)
        whole.view(len(counted), -1)[counted] = (to_rows * gradient).to(to_rows.dtype)
        return whole, None, None, None


def _chunk(rows: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> Tensor:
    """Return the loss of `rows`, and leave its gradient by their logits in the first rows of `logits`."""
    logits = logits[: len(rows)]
    if rows.dtype == weight.dtype == torch.float32:
        torch.mm(rows, weight.t(), out=logits)
    else:
        logits.copy_(rows.to(weight.dtype) @ weight.t())
    if bias is not None:
        logits += bias
    places = wanted[:, None]
    logits -= logits.amax(dim=1, keepdim=True)
    right = logits.gather(1, places)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    logits.div_(sums).scatter_add_(1, places, torch.full_like(right, -1.0))
    return (sums.log_() - right).sum()


ROTARY = "apply_rotary_pos_emb"
"""What transformers calls it in every family's module."""


@contextlib.contextmanager
def fused_rotary(model: nn.Module) -> Iterator[None]:
    """Within: rotary embeddings of `model`'s family are turned in one operation, where it has the usual ones.

    Families call a function of their module, so that one is replaced, for this process.
    """
    sources = {type(module).__module__ for module in model.modules()}
    homes = [vars(sys.modules[name]) for name in sorted(sources) if name in sys.modules]
    replaced = [(home, home[ROTARY]) for home in homes if ROTARY in home and _rotates(home[ROTARY])]
    for home, _ in replaced:
        home[ROTARY] = apply_rotary
    try:
        yield
    finally:
        for home, original in replaced:
            home[ROTARY] = original


def _rotates(original: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether `original` does what `apply_rotary` does, on random input."""
    if list(inspect.signature(original).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    made = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
    queries, keys, cos, sin = (torch.randn(shape, generator=made) for shape in shapes)
    turned = apply_rotary(queries, keys, cos, sin)
    pairs = zip(original(queries, keys, cos, sin), turned, strict=True)
    return all(torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5) for theirs, ours in pairs)


def apply_rotary(
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


def rms_norm(module: Any, x: Tensor) -> Tensor:
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


log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the comparison, relative to the largest value: another formula is off by far more."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module, what could be its forward, and the width and type of its input."""

    module: nn.Module
    forward: Callable[..., Tensor]
    features: int
    dtype: torch.dtype


def install(adapted: Any) -> None:
    """Rewrite LoRA layers, MLPs, norms and the output layer of a PeftModel, each where it can be."""
    fuse(adapted)
    counts = {"MLPs": 0, "norms": 0, "shared inputs": 0}
    same: dict[type, bool] = {}
    for module in adapted.modules():
        for kind, make in (("MLPs", _mlp), ("norms", _norm)):
            found = make(module)
            if found is None:
                continue
            if type(module) not in same:
                same[type(module)] = _same(found)
            if same[type(module)]:
                module.forward = found.forward
                counts[kind] += 1
        counts["shared inputs"] += _share(module)
    learns = install_loss(adapted.get_base_model())
    log.debug("rewritten: %s, loss in the output layer: %s", counts, learns)


def _mlp(module: nn.Module) -> Candidate | None:
    """Return the written-out forward of a gated SiLU MLP."""
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    names = ("gate_proj", "up_proj") if hasattr(module, "gate_proj") else ("gate_up_proj",)
    layers: list[Any] = [getattr(module, name, None) for name in (*names, "down_proj")]
    if len(list(module.children())) != len(layers) + 1 or not fused_lora.can_fuse(layers):
        return None
    forward = functools.partial(fused_lora.run_mlp, module, tuple(layers[:-1]), layers[-1])
    return Candidate(module, forward, layers[0].in_features, fused_lora.base_dtype(layers[0]))


def _norm(module: nn.Module) -> Candidate | None:
    """Return the written-out forward of an RMS norm."""
    weight: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    return Candidate(module, functools.partial(rms_norm, module), len(weight), weight.dtype)


def _share(module: nn.Module) -> bool:
    """Let the query, key and value projections of an attention compute together."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not fused_lora.can_fuse(layers):
        return False
    shared = fused_lora.FusedProjections(tuple(layers))
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(shared.call, number)  # type: ignore[union-attr]
    return True


def _same(found: Candidate) -> bool:
    """Whether the candidate computes what its class does, on random input."""
    made = torch.Generator().manual_seed(0)
    device = next(found.module.parameters()).device
    x = torch.randn(3, found.features, generator=made).to(device, found.dtype)
    half = found.dtype != torch.float32
    was = found.module.training
    found.module.train()
    with torch.enable_grad(), torch.autocast(device.type, found.dtype if half else None, enabled=half):
        ours = found.forward(x.requires_grad_()).detach().float()
        with torch.no_grad():
            theirs = type(found.module).forward(found.module, x).float()
    found.module.train(was)
    same = float((ours - theirs).abs().max()) <= TOLERANCE[found.dtype] * float(theirs.abs().max())
    if not same:
        log.debug("%s computes something else than its parts say", type(found.module).__name__)
    return same
