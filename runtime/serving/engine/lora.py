"""LoRA adapters (arXiv:2106.09685) beside the base weights, one per token of a step, never merged.

Every linear layer that can be adapted becomes a `LoraLinear`: the base product, plus the update of its own
adapter for each token that has one. Shapes: `N` flat tokens, `A` adapter slots, `M` modules merged into one
layer, `r` the largest LoRA rank; `U` and `c` as in adapter_groups.py. Does not know requests. Start at
`LoraLinear.forward`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.adapters.weights import scaled_pairs
from runtime.serving.engine import failures
from runtime.serving.engine.adapter_groups import (
    MASKED,
    AdapterGroups,
    Batched,
    Masked,
    PerToken,
    adapter_mask,
    group,
)
from runtime.serving.engine.batch import StepContext
from runtime.serving.engine.linear import HooklessModule

LoraWeights = dict[int, tuple[Tensor, Tensor]]
"""LoRA weights (r, in) and scaled (out, r) by merged module of one layer."""

SliceAdapter = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a layer's path and its LoRA weights (r, in) and (out, r) to this rank's slices of them."""


class LoraLinear(HooklessModule):
    """A linear layer with any number of adapters; the step under way says which token has which.

    It may stand for several modules with the same input, its outputs theirs one after another: each of these
    `M` modules has LoRA weights of its own, and their first products are one.
    """

    def __init__(
        self, base: nn.Module, step: StepContext, *, in_features: int, out_features: tuple[int, ...]
    ) -> None:
        """`base` maps (..., in) to (..., sum of outs); `out_features` of each merged module."""
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self._width, self._step = sum(out_features), step
        self.down: Tensor | None = None
        """(M, A, r, in) of all adapters."""
        self.ups: list[Tensor] = []
        """(A, r, out) of each module, scaled."""
        self._add_per_token: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """Where there are kernels, adds to each token the update of its own adapter."""

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus the updates, for x (1, N, in)."""
        out: Tensor = self.base(x)
        batch = self._step.batch
        if self.down is None or batch is None or batch.adapter_groups is None:
            return out
        groups = batch.adapter_groups
        flat, result = x.view(-1, self.in_features), out.view(-1, self._width)
        for span in groups.spans:
            here, adapter_slot = slice(span.begin, span.end), span.adapter_slot
            inner = flat[here] @ self.down[:, adapter_slot].flatten(0, 1).T
            self._add(result[here], inner, [up[adapter_slot] for up in self.ups])
        scattered = groups.scattered
        if isinstance(scattered, PerToken) and self._add_per_token is not None:
            self._add_per_token(flat, result, scattered.adapters)
        elif isinstance(scattered, Masked):
            count = scattered.count
            inner = flat[:count] @ self.down.flatten(0, 2).T
            inner.view(count, *self.down.shape[:3]).mul_(scattered.mask)
            self._add(result[:count], inner, [up.flatten(0, 1) for up in self.ups])
        elif isinstance(scattered, Batched):
            result.index_add_(0, scattered.tokens, self._batched(flat, self.down, scattered))
        return out

    def _add(self, result: Tensor, inner: Tensor, ups: Sequence[Tensor]) -> None:
        """Add each module's second product to its columns of result (T, outs); inner (T, M * rank)."""
        begin, rank = 0, inner.shape[1] // len(ups)
        for module, (up, out) in enumerate(zip(ups, self.out_features, strict=True)):
            result[:, begin : begin + out].addmm_(inner[:, module * rank : (module + 1) * rank], up)
            begin += out

    def _batched(self, flat: Tensor, down: Tensor, batched: Batched) -> Tensor:
        """Return (scattered tokens, outs) for flat (N, in): products of all adapters used at once."""
        x = flat.index_select(0, batched.gathered).view(len(batched.adapters), -1, self.in_features)
        downs = down[:, batched.adapters].transpose(2, 3)  # (M, U, in, r)
        updates = [
            torch.bmm(torch.bmm(x, own_down), up[batched.adapters])
            for own_down, up in zip(downs, self.ups, strict=True)
        ]
        return torch.cat(updates, -1).flatten(0, 1).index_select(0, batched.real)

    def room(self, weights: LoraWeights, *, adapter_slots: int) -> "Stacks | None":
        """Return the weights of all adapters with room for `weights`: new tensors, where these are too small.

        None where this layer has no adapter. Nothing changes before `place`.
        """
        if not weights and self.down is None:
            return None
        ranks = [down.shape[0] for down, _ in weights.values()]
        like = self.down if self.down is not None else next(iter(weights.values()))[0]
        rank = max([*ranks, self.down.shape[2] if self.down is not None else 1])
        if self.down is not None and self.down.shape[1:3] == (adapter_slots, rank):
            return Stacks(self.down, self.ups)
        new_down = like.new_zeros(len(self.out_features), adapter_slots, rank, self.in_features)
        new_ups = [like.new_zeros(adapter_slots, rank, out) for out in self.out_features]
        if self.down is not None:
            kept, old = min(adapter_slots, self.down.shape[1]), self.down.shape[2]
            new_down[:, :kept, :old] = self.down[:, :kept]
            for new, up in zip(new_ups, self.ups, strict=True):
                new[:kept, :old] = up[:kept]
        return Stacks(new_down, new_ups)

    def place(self, adapter_slot: int, weights: LoraWeights, stacks: "Stacks | None") -> None:
        """Put an adapter's weights into `adapter_slot` of what `room` returned, zeros where it has none."""
        if stacks is None:
            return
        for module, ups in enumerate(stacks.ups):
            stacks.down[module, adapter_slot], ups[adapter_slot] = 0, 0
            if module in weights:
                down, up = weights[module]
                stacks.down[module, adapter_slot, : down.shape[0]] = down
                ups[adapter_slot, : up.shape[1]] = up.T
        self.down, self.ups = stacks.down, stacks.ups
        if self._step.kernels is not None:
            self._add_per_token = self._step.kernels.lora(self.down, self.ups)

    def clear(self) -> None:
        """Drop all adapters."""
        self.down, self.ups, self._add_per_token = None, [], None


@dataclass(frozen=True, slots=True)
class Stacks:
    """The weights of one layer's adapters."""

    down: Tensor
    """(M, A, r, in)"""
    ups: list[Tensor]
    """(A, r, out) of each module, scaled."""


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """An adapter that has been read, and the memory that it goes to."""

    adapter_slot: int
    adapter_slots: int
    layers: list[tuple[LoraLinear, LoraWeights, Stacks | None]]


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """Where one of the model's own linear modules lives: it is module `index` of `layer`."""

    layer: LoraLinear
    index: int


class AdapterStore:
    """Adapters by name; each has a version (never used twice) and an adapter slot (its index in weights)."""

    def __init__(
        self,
        targets: dict[str, LoraTarget],
        *,
        dtype: torch.dtype,
        device: torch.device,
        slice_adapter: SliceAdapter | None = None,
        per_token: bool = False,
    ) -> None:
        """`targets` by the module paths that adapters name.

        `slice_adapter` where layers are one rank's slices; `per_token` where kernels serve scattered tokens.
        """
        self._targets = targets
        self._slice_adapter, self._per_token = slice_adapter, per_token
        self._layers = list({id(target.layer): target.layer for target in targets.values()}.values())
        self.device, self._dtype = device, dtype
        self._versions: dict[str, int] = {}
        self._next_version = itertools.count(1)
        self._slot_of: dict[int, int] = {}
        """Adapter slot by version."""
        self._slots = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters."""
        return tuple(self._versions)

    def version(self, name: str | None) -> int | None:
        """Return the version that `name` stands for now; None for the base model."""
        return None if name is None else self._versions[name]

    def group(self, versions: Sequence[int | None]) -> AdapterGroups | None:
        """Group a step's flat tokens by adapter, given the adapter version of each or None."""
        if versions.count(None) == len(versions):
            return None
        return group(
            self._adapter_slots(versions),
            adapter_slots=self._slots,
            device=self.device,
            dtype=self._dtype,
            per_token=self._per_token,
        )

    @property
    def is_masked(self) -> bool:
        """Whether there are so few adapters that one masked product over all of them is the cheapest way."""
        return self._slots <= MASKED

    def mask(self, versions: Sequence[int | None]) -> Tensor:
        """Return (tokens, 1, A, 1), one where each token has its adapter, given its version or None."""
        slots = self._adapter_slots(versions)
        return adapter_mask(slots, adapter_slots=self._slots, device=self.device, dtype=self._dtype)

    def _adapter_slots(self, versions: Sequence[int | None]) -> list[int | None]:
        return [None if version is None else self._slot_of[version] for version in versions]

    def _read(self, name: str, folder: Path, *, strength: float) -> dict[LoraLinear, LoraWeights]:
        """Return the adapter's weights by layer; ConfigError if they do not fit this model."""
        weights: dict[LoraLinear, LoraWeights] = {}
        for path, pair in scaled_pairs(folder, name=name, strength=strength).items():
            target = self._targets.get(path)
            if target is None:
                raise failures.does_not_fit(name, f"no layer '{path}' to adapt here")
            down, up = pair if self._slice_adapter is None else self._slice_adapter(path, *pair)
            expected = (target.layer.in_features, target.layer.out_features[target.index])
            if (down.shape[1], up.shape[0]) != expected:
                raise failures.does_not_fit(
                    name,
                    f"{path} maps {down.shape[1]} to {up.shape[0]} features, expected {expected[0]} to "
                    f"{expected[1]}",
                )
            weights.setdefault(target.layer, {})[target.index] = (
                down.to(self.device, self._dtype),
                up.to(self.device, self._dtype),
            )
        return weights

    def stage(self, name: str, folder: Path, *, strength: float) -> StagedAdapter:
        """Read an adapter and take the memory for it in every layer; ConfigError if it does not fit."""
        weights = self._read(name, folder, strength=strength)
        taken = set(self._slot_of.values())
        adapter_slot = next(number for number in itertools.count() if number not in taken)
        slots = 1 + max(adapter_slot, *taken) if taken else 1
        layers = []
        for layer in self._layers:
            own = weights.get(layer, {})
            layers.append((layer, own, layer.room(own, adapter_slots=slots)))
        return StagedAdapter(adapter_slot, slots, layers)

    def add(self, name: str, staged: StagedAdapter) -> None:
        """Serve what `stage` returned under `name`; takes no memory, so it is in all layers or in none."""
        self._slots = staged.adapter_slots
        for layer, weights, stacks in staged.layers:
            layer.place(staged.adapter_slot, weights, stacks)
        version = next(self._next_version)
        self._slot_of[version] = staged.adapter_slot
        self._versions[name] = version

    def remove(self, name: str) -> int:
        """Drop an adapter that no sequence uses, and return its version; its slot is free for the next."""
        version = self._versions.pop(name)
        del self._slot_of[version]
        if not self._slot_of:
            for layer in self._layers:
                layer.clear()
        return version
