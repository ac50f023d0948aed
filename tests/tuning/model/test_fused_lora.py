"""The fused LoRA update against peft's own, layer by layer."""

import contextlib
import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from runtime.tuning.model.adapter_matrices import held
from runtime.tuning.model.fused_lora import adapter_groups, install


def layers(base: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Return `base` under peft's adapter, and a fused twin with the same values."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], **options}
    plain = get_peft_model(nn.Sequential(base), LoraConfig(**settings))  # type: ignore[arg-type]
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    twin = copy.deepcopy(plain)
    install(twin)
    return plain, twin


def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and every gradient of one pass."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = model(x)
    (out.float() ** 2).sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def four_bit(*, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return bnb.nn.Linear4bit(64, 48, bias=bias, compute_dtype=torch.float32, quant_type="nf4").to("cpu")  # type: ignore[no-any-return]


def eight_bit(*, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return bnb.nn.Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False).to("cpu")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make", [four_bit, eight_bit, lambda: nn.Linear(64, 48)], ids=["nf4", "int8", "plain"]
)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_rslora": True}], ids=str)
def test_outputs_and_gradients_equal_pefts(make: Any, options: dict[str, Any]) -> None:
    plain, twin = layers(make(), **options)
    for ours, theirs in zip(run(twin, torch.ones(2, 5, 64)), run(plain, torch.ones(2, 5, 64)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_a_quantised_layer_with_a_bias_trains_as_in_peft(make: Any) -> None:
    """Qwen2's queries, keys and values; bitsandbytes returns a view there."""
    base = make(bias=True)
    base.requires_grad_(requires_grad=False)
    plain, twin = layers(base)
    x = torch.randn(2, 5, 64)
    for ours, theirs in zip(run(twin, x), run(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_autocast_the_update_has_autocasts_type_and_gradients_stay_float32(dtype: torch.dtype) -> None:
    plain, twin = layers(nn.Linear(64, 48))
    x = torch.randn(2, 5, 64)
    found = []
    for model in (twin, plain):
        with torch.autocast("cpu", dtype=dtype):
            found.append(run(model, x))
    assert found[0][0].dtype == dtype
    assert {gradient.dtype for gradient in found[0][1:]} == {torch.float32}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"lora_alpha": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_cast_once_give_the_gradients_of_those_cast_in_each_pass(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Over two passes whose gradients add up, as in a step."""
    _, model = layers(nn.Linear(64, 48), **options)
    found = []
    for once in (True, False):
        model.zero_grad()
        with (
            held(adapter_groups(model), dtype) if once else contextlib.nullcontext(),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        ):
            for seed in (1, 2):
                run(model, torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)))
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_held_matrices_are_used_and_then_forgotten() -> None:
    _, model = layers(nn.Linear(64, 48))
    (group,) = adapter_groups(model)
    x = torch.ones(2, 64)
    before = model(x)
    with held([group], torch.float32):
        group.held.a.zero_()  # type: ignore[union-attr]
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_variants_and_switched_off_adapters_are_pefts_own() -> None:
    dora, twin = layers(nn.Linear(64, 48), use_dora=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(twin(x), dora(x))
    assert install(dora) == 0
    plain, fused = layers(nn.Linear(64, 48))
    assert install(fused) == 1
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(x), plain(x))


def test_a_copied_model_computes_with_its_own_weights() -> None:
    _, fused = layers(nn.Linear(64, 48))
    other = copy.deepcopy(fused)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not other(torch.ones(2, 64)).any()
    assert fused(torch.ones(2, 64)).any()
