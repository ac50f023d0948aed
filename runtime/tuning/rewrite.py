"""Puts written-out operations in place of a model's own where they compute the same.

A module is recognised by its parts, and one of each class is compared with the original on random input
before any of that class is replaced: a family whose formula differs keeps its own. Start at `rewrite`.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.tuning import head, norms, projections
from runtime.tuning.fused import fuse

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


def rewrite(adapted: Any) -> None:
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
    learns = head.install(adapted.get_base_model())
    log.debug("rewritten: %s, loss in the output layer: %s", counts, learns)


def _mlp(module: nn.Module) -> Candidate | None:
    """Return the written-out forward of a gated SiLU MLP."""
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    names = ("gate_proj", "up_proj") if hasattr(module, "gate_proj") else ("gate_up_proj",)
    layers: list[Any] = [getattr(module, name, None) for name in (*names, "down_proj")]
    if len(list(module.children())) != len(layers) + 1 or not projections.able(layers):
        return None
    forward = functools.partial(projections.run_mlp, module, tuple(layers[:-1]), layers[-1])
    return Candidate(module, forward, layers[0].in_features, projections.computed_type(layers[0]))


def _norm(module: nn.Module) -> Candidate | None:
    """Return the written-out forward of an RMS norm."""
    weight: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    return Candidate(module, functools.partial(norms.norm, module), len(weight), weight.dtype)


def _share(module: nn.Module) -> bool:
    """Let the query, key and value projections of an attention compute together."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not projections.able(layers):
        return False
    shared = projections.Shared(tuple(layers))
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
