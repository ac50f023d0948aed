"""Linear layers in the fastest layout for this hardware: weights merged, and packed on a CPU.

Does not know models or adapters. Start at `LinearLayouts.fast`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.serving.engine.kernels import MAX_TOKENS, WIDTH, Kernels

FEW_TOKENS = (1, 2, 4, 8, 16)
"""Numbers of tokens at which two layouts are compared, until the one for few is no longer the faster."""
TRIALS = 5
COMPARISON_S = 0.4
"""For one size of weight. A machine that is busy with other work compares no better in a longer time."""
GAIN = 1.02
"""How much faster a second copy of a weight has to make a product."""
COLD_BYTES = 64 << 20
"""A comparison runs over so many bytes of weights in turn, since a step finds none of them in a CPU cache."""
MAX_COPIES = 32
"""Copies of a small weight, whose layout hardly matters."""


class HooklessModule(nn.Module):
    """A module whose call is its `forward`: looking for hooks, which none has, takes as long as a kernel."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Replace the call of every subclass."""
        super().__init_subclass__(**options)
        cls.__call__ = cls.forward  # type: ignore[method-assign]


class TransposedLinear(HooklessModule):
    """A linear layer whose weight lies as (in, out): on Intel CPUs the fastest layout for one token."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (out, in), as nn.Linear has it."""
        super().__init__()
        self.register_buffer("weight", weight.detach().t().contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        flat = x.reshape(-1, x.shape[-1])
        out = torch.mm(flat, self.weight) if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return out.view(*x.shape[:-1], -1)


def merge(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Return one linear layer whose output is theirs side by side; they are left without weights."""
    with torch.device("meta"):
        merged = nn.Linear(
            layers[0].in_features,
            sum(layer.out_features for layer in layers),
            bias=any(layer.bias is not None for layer in layers),
        )
    merged.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if merged.bias is not None:
        biases = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return merged


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` computes x W + b with the weight as it stands: no quantised or hooked subclass."""
    return type(layer) is nn.Linear or type(layer).__name__ == "FalconLinear"


@dataclass(frozen=True, slots=True)
class Packing:
    """oneDNN's own layout of a linear layer's weight, which torch has no public name for.

    `torch.utils.mkldnn.to_mkldnn` is public, but converts every input and output. So the two operators
    that torch.compile emits are looked up and tried once; without them, or should they ever compute
    something else, `fast` does without.
    """

    pack: Callable[[Tensor], Tensor]
    multiply: Callable[..., Tensor]

    @classmethod
    def find(cls) -> "Packing | None":
        """Return the operators, or None where this build of torch or this CPU has none that work."""
        pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        multiply = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if pack is None or multiply is None or not available:
            return None
        packing = cls(pack, multiply)
        weight, x = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(2, 4)
        try:
            is_exact = torch.allclose(PackedLinear(weight, None, packing)(x), x @ weight.T)
        except (RuntimeError, NotImplementedError, TypeError):
            return None
        return packing if is_exact else None


class PackedLinear(HooklessModule):
    """A linear layer over a packed weight: twice as fast as `F.linear` from 4 tokens on."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, packing: Packing) -> None:
        """`weight` (out, in), as nn.Linear has it."""
        super().__init__()
        self._multiply = packing.multiply
        self.register_buffer("weight", packing.pack(weight.detach().contiguous()), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        return self._multiply(x, self.weight, self.bias, "none", [], "")


class StreamedLinear(HooklessModule):
    """A linear layer over a weight in its own layout, which a kernel reads once for a few tokens."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        """`weight` (out, in), as nn.Linear has it."""
        super().__init__()
        self._kernels = kernels
        copy = weight.detach().clone(memory_format=torch.contiguous_format)  # aligned, and no view of a file
        self.register_buffer("weight", copy, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in), of MAX_TOKENS tokens at most."""
        return self._kernels.multiply(x.contiguous(), self.weight, self.bias)


class LinearBySize(HooklessModule):
    """Two layouts of one weight, each for the numbers of tokens it is faster at; takes twice the memory."""

    def __init__(
        self, few: TransposedLinear | StreamedLinear, many: PackedLinear, *, few_tokens: int
    ) -> None:
        """`few` runs up to `few_tokens` tokens."""
        super().__init__()
        self.few, self.many, self._few_tokens = few, many, few_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        tokens = x.numel() // x.shape[-1]
        out: Tensor = self.few(x) if tokens <= self._few_tokens else self.many(x)
        return out


def measure_few_tokens(
    few: Sequence[nn.Module], many: Sequence[nn.Module], features: int, *, limit: int = FEW_TOKENS[-1]
) -> int:
    """Return up to how many tokens (tokens, features) `few` are clearly the faster layers here, 0 for none.

    They take `limit` tokens at most.

    Measured, because the CPU and its libraries decide: at one token MKL reads a transposed weight faster than
    oneDNN a packed one on an Intel CPU, half as fast on an AMD one (tests/bench/RESULTS.md).
    """
    most = 0
    deadline = time.perf_counter() + COMPARISON_S
    for tokens in (each for each in FEW_TOKENS if each <= limit):
        x = torch.zeros(tokens, features)
        seconds = [math.inf, math.inf]
        for _ in range(TRIALS):
            for index, layers in enumerate((few, many)):
                begun = time.perf_counter()
                for layer in layers:
                    layer(x)
                seconds[index] = min(seconds[index], time.perf_counter() - begun)
            if time.perf_counter() > deadline:
                break
        if seconds[0] * GAIN > seconds[1]:
            break
        most = tokens
    return most


class LinearLayouts:
    """Gives linear layers the layouts that are fastest on their device."""

    def __init__(self, *, twice: bool, kernels: Kernels | None = None) -> None:
        """`twice` allows two layouts of each weight."""
        self._twice, self._kernels = twice, kernels
        self._packing = Packing.find()
        self._measured: dict[tuple[int, int], int] = {}
        """By (in, out)."""

    def fast(self, layer: nn.Module) -> nn.Module:
        """Return the fastest module for `layer` on its device: itself, or its weights in another layout."""
        if not (isinstance(layer, nn.Linear) and is_plain(layer) and layer.weight.device.type == "cpu"):
            return layer
        if self._packing is None or layer.weight.dtype != torch.float32:
            return TransposedLinear(layer.weight, layer.bias)
        size = (layer.in_features, layer.out_features)
        packed = PackedLinear(layer.weight, layer.bias, self._packing)
        if not self._twice or self._measured.get(size) == 0:
            return packed
        few = self._few(layer.weight, layer.bias)
        if size not in self._measured:
            self._measured[size] = self._compare(few, packed, layer=layer, packing=self._packing)
        most = self._measured[size]
        return LinearBySize(few, packed, few_tokens=most) if most else packed

    def _few(self, weight: Tensor, bias: Tensor | None) -> TransposedLinear | StreamedLinear:
        """Return the layout for few tokens."""
        if self._kernels is None or weight.shape[1] % WIDTH:
            return TransposedLinear(weight, bias)
        return StreamedLinear(weight, bias, self._kernels)

    def _compare(
        self,
        few: TransposedLinear | StreamedLinear,
        packed: PackedLinear,
        *,
        layer: nn.Linear,
        packing: Packing,
    ) -> int:
        """Return up to how many tokens `few` is faster than `packed`, both made from `layer`."""
        weight, bias = layer.weight, layer.bias
        others = range(min(COLD_BYTES // weight.nbytes, MAX_COPIES - 1))
        limit = MAX_TOKENS if isinstance(few, StreamedLinear) else FEW_TOKENS[-1]
        return measure_few_tokens(
            [few, *(self._few(weight, bias) for _ in others)],
            [packed, *(PackedLinear(weight, bias, packing) for _ in others)],
            layer.in_features,
            limit=limit,
        )
