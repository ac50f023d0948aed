"""Fused operations against transformers' and peft's own, family by family."""

import contextlib
import copy
import functools
import sys
from typing import Any

import pytest
import torch
from torch import nn

from runtime import families
from runtime.families import Family
from runtime.tuning.data.batching import IGNORE, collate
from runtime.tuning.loss import batch_loss
from runtime.tuning.model import fused_ops, packed_attention
from runtime.tuning.model.fused_lora import adapter_groups
from runtime.tuning.model.fused_ops import apply_rotary
from runtime.tuning.model.lora import attach
from runtime.tuning.settings import Lora
from tests.families import PACKED
from tests.tuning.tiny_models import some_rows, tiny_model


def adapted(family: str, lora: Lora, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, attention="sdpa").to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.1)
    found = attach(model, lora)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return found.train()


def plain(model: Any) -> Any:
    """Return a copy of `model` with every forward as its class has it."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__.pop("forward", None)
    return twin


def step(model: Any, *, packed: bool, rotating: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    batch = collate(some_rows(5), "packed" if packed else "sorted", pad_id=0)
    packed_attention.register()
    model.get_base_model().set_attn_implementation(packed_attention.NAME if packed else "sdpa")
    with fused_ops.fused_rotary(model) if rotating else contextlib.nullcontext():
        loss = batch_loss(model, batch, "cpu") / int((batch.labels != IGNORE).sum())
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(model: Any, *, packed: bool = True, rel: float = 1e-6, atol: float = 2e-6) -> None:
    ours, theirs = step(model, packed=packed), step(plain(model), packed=packed, rotating=False)
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.any()
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=atol)


def installed(model: Any) -> dict[str, int]:
    """Return how many modules have which forward, single LoRA layers left out."""
    names: list[str] = []
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial):
            names.append(forward.func.__name__)
        elif forward is not None:
            names.append(type(forward).__name__)
    return {name: names.count(name) for name in set(names) - {"lora_forward"}}


def expected(family: Family, model: Any) -> dict[str, int]:
    """Return how many modules of a model with two layers get which forward."""
    norms = sum(hasattr(module, "variance_epsilon") for module in model.modules())
    counts = {
        "run_mlp": 2 if family.fused else 0,
        "rms_norm": norms if family.fused else 0,
        "call": 0 if family.joined_qkv else 6,
        "LossHead": int(family.plain_logits),
    }
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("family", [*PACKED, "falcon"])
def test_loss_and_gradients_are_those_of_the_families_own_modules(family: str) -> None:
    model = adapted(family, Lora(r=4, alpha=6))
    assert installed(model) == expected(families.find(family), model)
    same(model, packed=families.find(family).packed)


@pytest.mark.parametrize(
    "lora",
    [Lora(r=4, dropout=0.5), Lora(r=4, targets=("q_proj", "down_proj")), Lora(options={"use_dora": True})],
    ids=["dropout", "some-layers", "dora"],
)
def test_what_cannot_be_fused_stays_pefts(lora: Lora) -> None:
    model = adapted("llama", lora)
    assert installed(model) == {"rms_norm": 5, "LossHead": 1}
    if not lora.dropout:
        same(model)


def test_bfloat16_under_autocast_is_within_its_rounding() -> None:
    model = adapted("llama", Lora(r=4, alpha=6), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(model, packed=False, rel=5e-3, atol=5e-3)


def test_recomputed_layers_have_the_same_gradients() -> None:
    model = adapted("llama", Lora(r=4, alpha=6))
    expected = step(copy.deepcopy(model), packed=True)
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    again = step(model, packed=True)
    assert again[0] == expected[0]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "lora", "groups"),
    [
        ("llama", Lora(r=4), [1, 1, 1, 1, 2, 2, 3, 3]),
        ("phi3", Lora(r=4), [1] * 8),
        ("llama", Lora(r=4, dropout=0.5), [1] * 14),
    ],
)  # fmt: skip
def test_each_adapter_is_in_one_group(family: str, lora: Lora, groups: list[int]) -> None:
    """So each is cast once: by attention and MLP together where they are fused, else by itself."""
    found = adapter_groups(adapted(family, lora))
    assert sorted(len(group.layers) for group in found) == groups
    assert len({layer for group in found for layer in group.layers}) == sum(groups)


class OddRMSNorm(nn.Module):
    """Looks like an RMS norm, and adds one to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def test_a_module_with_another_formula_is_left_alone() -> None:
    model = adapted("llama", Lora(r=4))
    model.get_base_model().model.norm = OddRMSNorm()
    fused_ops.install(model)
    assert "forward" not in vars(model.get_base_model().model.norm)


def test_rotary_embeddings_are_the_families_own_again_afterwards() -> None:
    model = adapted("llama", Lora(r=4))
    home: Any = sys.modules["transformers.models.llama.modeling_llama"]
    original = home.apply_rotary_pos_emb
    with pytest.raises(KeyError), fused_ops.fused_rotary(model):
        assert home.apply_rotary_pos_emb is apply_rotary
        raise KeyError
    assert home.apply_rotary_pos_emb is original
