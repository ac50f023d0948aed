"""LoRA adapters that live beside the base weights, one per row of a batch, never merged.

Every linear layer that may be adapted becomes a `LoraLinear`: the base product, plus for the flat tokens
that ask for it their own adapter's update. Shapes: `A` resident adapters, `N` flat tokens, `r` the largest
rank, `n` parts of a layer, `S` scattered tokens, `P` adapters they have, `c` tokens of the busiest. Does not
know requests. Start at `LoraLinear.forward`; `group` says which tokens are whose.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.adapters import CONFIG_FILE, WEIGHTS_FILE, scaling
from runtime.errors import ConfigError
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.linear import HooklessModule

LOOPED = 2
"""Up to this many spans, products of their own each."""
SPAN_TOKENS = 16
"""A span of this many tokens has products of its own however many there are."""
MASKED = 24
"""Up to this many resident adapters, one product over all of them with a mask is the cheapest form."""


@dataclass(frozen=True, slots=True)
class Masked:
    """The first `count` tokens, run through every resident adapter and masked."""

    count: int
    mask: Tensor
    """(count, 1, A, 1), one where the token has the adapter."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """The first tokens, each with its own adapter in one call (kernels/)."""

    lanes: Tensor
    """(T,) adapter of each, -1 for none."""


@dataclass(frozen=True, slots=True)
class Batched:
    """Scattered tokens, gathered by adapter and padded to equal numbers."""

    present: Tensor
    """(P,) the adapters."""
    read: Tensor
    """(P * c,) flat indices."""
    real: Tensor
    """Where in `read` is no padding."""
    tokens: Tensor
    """`read[real]`."""


@dataclass(frozen=True, slots=True)
class AdapterGroups:
    """The flat tokens of one batch by adapter."""

    spans: tuple[tuple[int, int, int], ...]
    """(adapter, begin, end) of tokens that lie together: prompt chunks, neighbouring rows."""
    scattered: PerToken | Masked | Batched | None
    """The other tokens that have an adapter."""


def group(
    owners: Sequence[tuple[int | None, int]],
    *,
    resident: int,
    device: torch.device,
    dtype: torch.dtype,
    own: bool = False,
) -> AdapterGroups | None:
    """Sort the flat tokens by adapter, given (adapter or None, count) in flat order; None if all are None.

    With `own` there are kernels for scattered tokens.
    """
    spans = _spans(owners)
    if not spans:
        return None
    small = [span for span in spans if span[2] - span[1] < SPAN_TOKENS]
    large = tuple(span for span in spans if span not in small)
    if own and small:
        return AdapterGroups(large, PerToken(_numbers(_lanes(small))))
    if len(small) <= LOOPED:
        return AdapterGroups(tuple(spans), None)
    count = small[-1][2]
    # decoding rows come first, so the scattered tokens are a beginning, unless a long prompt ends shortly
    if resident > MASKED or any(begin < count for _, begin, _ in large):
        return AdapterGroups(large, _batched(small, device))
    found = mask(_lanes(small), resident=resident, device=device, dtype=dtype)
    return AdapterGroups(large, Masked(count, found))


def _lanes(spans: list[tuple[int, int, int]]) -> list[int | None]:
    """Return the adapter of each token up to the end of the last span."""
    lanes: list[int | None] = [None] * spans[-1][2]
    for adapter, begin, end in spans:
        lanes[begin:end] = [adapter] * (end - begin)
    return lanes


def mask(lanes: Sequence[int | None], *, resident: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (T, 1, A, 1), one where each of T tokens has its adapter."""
    return (_numbers(lanes)[:, None] == torch.arange(resident)).to(device, dtype)[:, None, :, None]


def _numbers(lanes: Sequence[int | None]) -> Tensor:
    """Return (T,) the adapters, -1 for none."""
    return torch.tensor([-1 if lane is None else lane for lane in lanes])


def _batched(spans: list[tuple[int, int, int]], device: torch.device) -> Batched:
    by_adapter: dict[int, list[int]] = {}
    for adapter, begin, end in spans:
        by_adapter.setdefault(adapter, []).extend(range(begin, end))
    widest = max(len(tokens) for tokens in by_adapter.values())
    read = [token for tokens in by_adapter.values() for token in tokens + [0] * (widest - len(tokens))]
    real = [n * widest + c for n, tokens in enumerate(by_adapter.values()) for c in range(len(tokens))]
    numbers = [list(by_adapter), read, real, [read[index] for index in real]]
    return Batched(*(torch.tensor(each, dtype=torch.long).to(device) for each in numbers))


def _spans(owners: Sequence[tuple[int | None, int]]) -> list[tuple[int, int, int]]:
    """Return (adapter, begin, end) of the flat tokens that have one, neighbours of one adapter joined."""
    spans: list[tuple[int, int, int]] = []
    begin = 0
    for adapter, count in owners:
        if adapter is not None and spans and spans[-1][0] == adapter and spans[-1][2] == begin:
            spans[-1] = (adapter, spans[-1][1], begin + count)
        elif adapter is not None:
            spans.append((adapter, begin, begin + count))
        begin += count
    return spans


class LoraLinear(HooklessModule):
    """A linear layer with any number of adapters; the step under way says which token has which.

    It may stand for several layers with the same input, its outputs theirs one after another: each of
    these `n` parts has LoRA weights of its own, and their first products are one.
    """

    def __init__(self, base: nn.Module, size: tuple[int, tuple[int, ...]], step: "StepContext") -> None:
        """`base` maps (..., in) to (..., sum of outs); `size` is (in, outs)."""
        super().__init__()
        self.base = base
        self.in_features, self.outs = size
        self._step = step
        self.down: Tensor | None = None
        """(n, A, r, in) of all resident adapters."""
        self.ups: list[Tensor] = []
        """(A, r, out) of each part, scaled."""
        self._adapt: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """Where there are kernels, adds each token's own update."""

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus the updates, for x (1, N, in)."""
        out: Tensor = self.base(x)
        groups = self._step.groups
        if groups is None or self.down is None:
            return out
        flat, result = x.view(-1, self.in_features), out.view(-1, sum(self.outs))
        for adapter, begin, end in groups.spans:
            inner = flat[begin:end] @ self.down[:, adapter].flatten(0, 1).T
            self._add(result[begin:end], inner, [up[adapter] for up in self.ups])
        if isinstance(groups.scattered, PerToken) and self._adapt is not None:
            self._adapt(flat, result, groups.scattered.lanes)
        elif isinstance(groups.scattered, Masked):
            count = groups.scattered.count
            inner = flat[:count] @ self.down.flatten(0, 2).T
            inner.view(count, *self.down.shape[:3]).mul_(groups.scattered.mask)
            self._add(result[:count], inner, [up.flatten(0, 1) for up in self.ups])
        elif isinstance(groups.scattered, Batched):
            result.index_add_(0, groups.scattered.tokens, self._batched(flat, self.down, groups.scattered))
        return out

    def _add(self, result: Tensor, inner: Tensor, ups: Sequence[Tensor]) -> None:
        """Add each part's second product to its columns of result (T, outs); inner (T, n * rank)."""
        begin, rank = 0, inner.shape[1] // len(ups)
        for part, (up, out) in enumerate(zip(ups, self.outs, strict=True)):
            result[:, begin : begin + out].addmm_(inner[:, part * rank : (part + 1) * rank], up)
            begin += out

    def _batched(self, flat: Tensor, down: Tensor, batched: Batched) -> Tensor:
        """Return (S, outs) for flat (N, in): products of all adapters present at once."""
        x = flat.index_select(0, batched.read).view(len(batched.present), -1, self.in_features)
        chosen = down[:, batched.present].transpose(2, 3)  # (n, P, in, r)
        updates = [
            torch.bmm(torch.bmm(x, part), up[batched.present])
            for part, up in zip(chosen, self.ups, strict=True)
        ]
        return torch.cat(updates, -1).flatten(0, 1).index_select(0, batched.real)

    def place(self, lane: int, weights: "LoraWeights", *, lanes: int) -> None:
        """Put an adapter's (r, in) and (out, r) by part at place `lane` of `lanes`; else zeros."""
        if not weights and self.down is None:
            return
        ranks = [down.shape[0] for down, _ in weights.values()]
        like = self.down if self.down is not None else next(iter(weights.values()))[0]
        rank = max([*ranks, self.down.shape[2] if self.down is not None else 1])
        new_down = like.new_zeros(len(self.outs), lanes, rank, self.in_features)
        new_ups = [like.new_zeros(lanes, rank, out) for out in self.outs]
        if self.down is not None:
            kept, old = min(lanes, self.down.shape[1]), self.down.shape[2]
            new_down[:, :kept, :old] = self.down[:, :kept]
            for new, up in zip(new_ups, self.ups, strict=True):
                new[:kept, :old] = up[:kept]
        for part, new in enumerate(new_ups):
            new_down[part, lane], new[lane] = 0, 0
            if part in weights:
                down, up = weights[part]
                new_down[part, lane, : down.shape[0]] = down
                new[lane, : up.shape[1]] = up.T
        self.down, self.ups = new_down, new_ups
        if self._step.kernels is not None:
            self._adapt = self._step.kernels.adapt(new_down, new_ups)

    def clear(self) -> None:
        """Forget all adapters."""
        self.down, self.ups, self._adapt = None, [], None


LoraWeights = dict[int, tuple[Tensor, Tensor]]
"""LoRA weights (r, in) and scaled (out, r) by part of one layer."""


@dataclass(slots=True)
class StepContext:
    """What every layer of one model shares: whose tokens are running."""

    kernels: Kernels | None = None
    """What gives scattered tokens their own adapters, on a CPU."""
    groups: AdapterGroups | None = None


_PREFIX = "base_model.model."

Cut = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a layer's path and its LoRA weights (r, in) and (out, r) to the parts of them that belong here."""


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """Where one of the model's own linear layers lives: it is part `index` of `layer`."""

    layer: LoraLinear
    index: int


class AdapterStore:
    """Adapters by name; each has a version (never used twice) and a lane (its place in the stacks)."""

    def __init__(
        self,
        parts: dict[str, LoraTarget],
        *,
        dtype: torch.dtype,
        device: torch.device,
        cut: "Cut | None" = None,
        own: bool = False,
    ) -> None:
        """`parts` by the module paths that adapters name; `cut` where layers are parts of the model's.

        `own` where kernels give scattered tokens their own adapters.
        """
        self._parts = parts
        self._cut, self._own = cut, own
        self._layers = list({id(part.layer): part.layer for part in parts.values()}.values())
        self.device, self._dtype = device, dtype
        self._versions: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._lanes: dict[int, int] = {}
        self._width = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The resident adapters."""
        return tuple(self._versions)

    def version(self, name: str | None) -> int | None:
        """Return the version that `name` stands for now; None for the base."""
        return None if name is None else self._versions[name]

    def group(self, owners: Sequence[tuple[int | None, int]]) -> AdapterGroups | None:
        """Sort a batch's flat tokens by adapter, given (version or None, count) in flat order."""
        lanes = [(None if version is None else self._lanes[version], count) for version, count in owners]
        return group(lanes, resident=self._width, device=self.device, dtype=self._dtype, own=self._own)

    @property
    def is_masked(self) -> bool:
        """Whether so few adapters are resident that one product over all of them is the cheapest form."""
        return self._width <= MASKED

    def mask(self, owners: Sequence[int | None]) -> Tensor:
        """Return (T, 1, A, 1), one where each of T tokens has its adapter, given by version."""
        lanes = [None if version is None else self._lanes[version] for version in owners]
        return mask(lanes, resident=self._width, device=self.device, dtype=self._dtype)

    def read(self, name: str, folder: Path, *, strength: float) -> dict[LoraLinear, LoraWeights]:
        """Return the adapter's (r, in) and scaled (out, r) by layer and part; ConfigError if unfit."""
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none":
            raise ConfigError(f"adapter {name}: has DoRA or trained biases, expected plain LoRA weights")
        found: dict[LoraLinear, LoraWeights] = {}
        pairs = _pairs(name, load_file(str(folder / WEIGHTS_FILE)))
        for path, pair in pairs.items():
            part = self._parts.get(path)
            if part is None:
                raise ConfigError(f"adapter {name}: does not fit this model: no layer '{path}' to adapt here")
            down, up = pair if self._cut is None else self._cut(path, *pair)
            expected = (part.layer.in_features, part.layer.outs[part.index])
            if (down.shape[1], up.shape[0]) != expected or down.shape[0] != up.shape[1]:
                raise ConfigError(
                    f"adapter {name}: does not fit this model: {path} maps {down.shape[1]} to {up.shape[0]} "
                    f"features, expected {expected[0]} to {expected[1]}"
                )
            scale = strength * scaling(config, path, down.shape[0])
            found.setdefault(part.layer, {})[part.index] = (
                down.to(self.device, self._dtype),
                (up.float() * scale).to(self.device, self._dtype),
            )
        return found

    def add(self, name: str, weights: dict[LoraLinear, LoraWeights]) -> None:
        """Make what `read` returned answerable under `name`."""
        taken = set(self._lanes.values())
        lane = next(number for number in itertools.count() if number not in taken)
        self._width = 1 + max(lane, *taken) if taken else 1
        for layer in self._layers:
            layer.place(lane, weights.get(layer, {}), lanes=self._width)
        version = next(self._numbers)
        self._lanes[version] = lane
        self._versions[name] = version

    def remove(self, name: str) -> int:
        """Forget an adapter that no row uses, and return its version; its lane is free for the next."""
        version = self._versions.pop(name)
        del self._lanes[version]
        if not self._lanes:
            for layer in self._layers:
                layer.clear()
        return version


def _pairs(name: str, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (lora_A, lora_B) by module path."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, down in weights.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        other = f"{key.removesuffix('.lora_A.weight')}.lora_B.weight"
        if other not in weights:
            raise ConfigError(f"adapter {name}: {path} has lora_A but no lora_B weights")
        pairs[path] = (down, weights[other])
    strange = [key for key in weights if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange or 2 * len(pairs) != len(weights):
        odd = strange[0] if strange else "lora_B without lora_A"
        raise ConfigError(f"adapter {name}: holds {odd}, expected lora_A and lora_B of linear layers only")
    return pairs
