"""Weight layouts: whatever the layout, the product is that of nn.Linear."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.serving.engine import linear
from runtime.serving.engine.batch import StepContext
from runtime.serving.engine.create import FUSED_TOKENS
from runtime.serving.engine.kernels import MAX_TOKENS, Kernels
from runtime.serving.engine.layers import LayerFactory
from runtime.serving.engine.linear import (
    LinearBySize,
    LinearLayouts,
    PackedLinear,
    Packing,
    StreamedLinear,
    TransposedLinear,
    merge,
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 51, 52, 300])
def test_every_layout_computes_the_same_product(
    monkeypatch: pytest.MonkeyPatch, bias: bool, twice: bool, tokens: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "measure_few_tokens", lambda *_, **__: 51)
    layer = nn.Linear(96, 160, bias=bias)
    x = torch.randn(1, tokens, 96)
    with torch.inference_mode():
        expected = layer(x)
        fast = LinearLayouts(twice=twice).fast(layer)
        assert fast is not layer
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            TransposedLinear(layer.weight, layer.bias)(x), expected, rtol=1e-5, atol=1e-5
        )


def test_packing_is_found_on_this_build_of_torch() -> None:
    """Fails when torch renames the operators, so that a loss of speed is not found by users."""
    assert Packing.find() is not None
    assert isinstance(LinearLayouts(twice=False).fast(nn.Linear(8, 8)), PackedLinear)


@pytest.mark.parametrize("bias", [True, False])
def test_with_kernels_a_few_tokens_are_streamed_and_more_are_packed(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(linear, "measure_few_tokens", lambda *_, limit: limits.append(limit) or limit)
    kernels = Kernels.find()
    if kernels is None:
        pytest.skip("built without kernels")
    layer = nn.Linear(96, 160, bias=bias)
    with torch.inference_mode():
        fast = LinearLayouts(twice=True, kernels=kernels).fast(layer)
        assert isinstance(fast, LinearBySize)
        assert isinstance(fast.few, StreamedLinear)
        assert limits == [MAX_TOKENS]
        assert fast.few.weight.data_ptr() != layer.weight.data_ptr(), "is no view of a file that others keep"
        for tokens in range(1, MAX_TOKENS + 2):
            x = torch.randn(1, tokens, 96)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)
    odd = LinearLayouts(twice=True, kernels=kernels).fast(nn.Linear(40, 8))
    assert isinstance(odd, LinearBySize)
    assert isinstance(odd.few, TransposedLinear), "kernels take multiples of 16"


class Timed(nn.Module):
    """Takes `seconds[tokens]` by a clock that stands still otherwise."""

    now = 0.0

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> None:
        Timed.now += self.seconds.get(x.shape[0], 1.0)


@pytest.mark.parametrize(
    ("transposed", "most"),
    [({}, 0), ({1: 0.99}, 0), ({1: 0.8}, 1), ({1: 0.8, 2: 0.8, 4: 0.8, 16: 0.8}, 4), ({2: 0.5}, 0)],
)
def test_a_second_layout_serves_up_to_the_tokens_at_which_it_is_measured_to_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, transposed: dict[int, float], most: int
) -> None:
    monkeypatch.setattr(linear.time, "perf_counter", lambda: Timed.now)
    assert linear.measure_few_tokens([Timed(transposed)], [Timed({})], 8) == most


def test_a_comparison_on_a_busy_machine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is slow, the second layout the faster: one trial of each number of tokens decides."""
    monkeypatch.setattr(linear.time, "perf_counter", lambda: Timed.now)
    began = Timed.now
    few = dict.fromkeys(linear.FEW_TOKENS, 0.5)
    assert linear.measure_few_tokens([Timed(few)], [Timed({})], 8) == linear.FEW_TOKENS[-1]
    assert Timed.now - began == pytest.approx(1.5 * len(linear.FEW_TOKENS))


@pytest.mark.parametrize("most", [0, 2])
def test_a_second_layout_that_is_no_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    measured = []
    monkeypatch.setattr(linear, "measure_few_tokens", lambda *_, **__: measured.append(1) or most)
    layouts = LinearLayouts(twice=True)
    for _ in range(2):
        assert isinstance(layouts.fast(nn.Linear(8, 8)), LinearBySize if most else PackedLinear)
    assert len(measured) == 1, "once for each size"


def test_without_packing_or_with_a_wrong_one_the_plain_layout_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear.PackedLinear, "__call__", lambda *_: torch.zeros(2, 3))
    assert Packing.find() is None
    layer = nn.Linear(8, 8)
    assert isinstance(LinearLayouts(twice=True).fast(layer), TransposedLinear)
    assert isinstance(LinearLayouts(twice=False).fast(layer.to(torch.bfloat16)), TransposedLinear)


def test_merged_layers_give_their_outputs_side_by_side() -> None:
    layers = [nn.Linear(16, 8), nn.Linear(16, 24, bias=False), nn.Linear(16, 4)]
    x = torch.randn(3, 16)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(merge(layers)(x), expected)
    assert all(layer.weight.numel() == 0 for layer in layers), "one copy of the weights"


class QuantisedProducts(TorchDispatchMode):
    """Notes bitsandbytes' operations, and how many tokens each has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bitsandbytes":
            x: Tensor = args[0]
            assert x.is_contiguous()
            self.found.append((func.overloadpacket.__name__, x.numel() // x.shape[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_weights_are_multiplied_in_one_call_that_may_be_fused(tokens: int, nested: bool) -> None:
    """On a GPU that operation chooses between its fused kernel and dequantising, by its number of tokens."""
    layer = bitsandbytes.nn.Linear4bit(
        64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested
    )
    layer = layer.to("cpu").eval()
    served = LayerFactory(StepContext(), LinearLayouts(twice=False)).linear("x", layer)
    with torch.inference_mode(), QuantisedProducts() as products:
        served(torch.randn(1, tokens, 64))
    name = "gemv_4bit" if layer.support_avx512bf16_for_cpu else "gemm_4bit"
    assert products.found == [(name, tokens)]


def test_so_many_tokens_are_always_fused_by_the_installed_bitsandbytes() -> None:
    rules = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    assert f"_GEMM_4BIT_CUSTOM_FLOOR_M = {FUSED_TOKENS}\n" in rules.read_text()
