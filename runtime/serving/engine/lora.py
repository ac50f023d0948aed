"""LoRA adapters (arXiv:2106.09685) beside the base weights, one per token of a step, never merged.

Every linear layer that can be adapted becomes a `LoraLinear`: the base product, plus the update of its own
adapter for each token that has one. Shapes: `N` flat tokens, `T` scattered ones, `A` adapter slots, `M`
modules merged into one layer, `r` the largest rank that is loaded. Does not know requests. Start at
`LoraLinear.forward`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.adapters.weights import in_pieces, not_finite, scaled_pairs
from runtime.errors import is_out_of_memory
from runtime.serving.engine import failures
from runtime.serving.engine.adapter_groups import NO_ADAPTER, AdapterGroups, group
from runtime.serving.engine.batch import StepContext
from runtime.serving.engine.linear import HooklessModule

GATHERED_BYTES = 64 << 20
"""Weights gathered at a time: what a GPU's second cache holds, and the most memory that gathering takes."""
SLOTS_STEP, LARGE_SLOTS_STEP = 4, 16
"""Adapter slots are made by so many, above LARGE_SLOTS_STEP of them by that many: weights that stay where
they are keep their CUDA graphs. One step more than needed stays: adapters that take turns move nothing."""
RANK_STEP = 8
"""On a GPU ranks are padded to multiples of this: 16 bytes of a row, which its matrix units ask for."""

LoraWeights = dict[int, tuple[Tensor, Tensor]]
"""LoRA weights (r, in) and scaled (out, r) by merged module of one layer."""

AdapterWeights = dict["LoraLinear", LoraWeights]
"""What was read of an adapter, in the host's memory."""

SliceAdapter = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a layer's path and its LoRA weights (r, in) and (out, r) to this rank's slices of them."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """The weights of one layer's adapters, one row each; those of slot NO_ADAPTER are zeros."""

    rows: Tensor
    """(A, M r in + r outs): of each module its A, then of each its B."""
    rank: int
    in_features: int
    out_features: tuple[int, ...]

    @classmethod
    def zeros(cls, like: Tensor, slots: int, rank: int, features: tuple[int, tuple[int, ...]]) -> "Stacks":
        """Return room for `slots` adapters of a layer with `features`: in, and out of each module."""
        in_features, out_features = features
        size = rank * (len(out_features) * in_features + sum(out_features))
        return cls(like.new_zeros(slots, size), rank, in_features, out_features)

    @property
    def slots(self) -> int:
        return len(self.rows)

    @property
    def down(self) -> Tensor:
        """(A, M, r, in), a view."""
        modules = len(self.out_features)
        return self.rows[:, : modules * self.rank * self.in_features].view(
            self.slots, modules, self.rank, self.in_features
        )

    @property
    def ups(self) -> list[Tensor]:
        """(A, r, out) of each module, scaled; views."""
        begin = len(self.out_features) * self.rank * self.in_features
        sizes = [self.rank * out for out in self.out_features]
        parts = torch.split(self.rows[:, begin:], sizes, dim=1)
        return [
            part.view(self.slots, self.rank, out) for part, out in zip(parts, self.out_features, strict=True)
        ]

    def gather(self, adapter_slots: Tensor) -> "Stacks":
        """Return the weights at `adapter_slots` (T,), a copy."""
        rows = self.rows.index_select(0, adapter_slots)
        return Stacks(rows, self.rank, self.in_features, self.out_features)

    def take(self, other: "Stacks") -> None:
        """Copy the adapters of the first slots of `other`, of the same layer, as far as there is room."""
        slots, rank = min(self.slots, other.slots), min(self.rank, other.rank)
        self.down[:slots, :, :rank] = other.down[:slots, :, :rank]
        for up, theirs in zip(self.ups, other.ups, strict=True):
            up[:slots, :rank] = theirs[:slots, :rank]

    def put(self, adapter_slot: int, weights: LoraWeights) -> None:
        """Put an adapter's weights into `adapter_slot`, zeros where it has none."""
        self.rows[adapter_slot] = 0
        down, ups = self.down, self.ups
        for module, (own_down, own_up) in weights.items():
            down[adapter_slot, module, : own_down.shape[0]] = own_down
            ups[module][adapter_slot, : own_up.shape[1]] = own_up.T

    def vacate(self, adapter_slot: int, target: int) -> None:
        """Move the adapter in `adapter_slot` to `target`, over the one there, and leave zeros behind."""
        if adapter_slot != target:
            self.rows[target] = self.rows[adapter_slot]
        self.rows[adapter_slot] = 0


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
        self.stacks: Stacks | None = None
        """None where no adapter has weights of this layer."""
        self._add_per_token: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """Where there are kernels, adds to each token the update of its own adapter."""

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus the updates, for x (1, N, in)."""
        out: Tensor = self.base(x)
        batch = self._step.batch
        if self.stacks is None or batch is None or batch.adapter_groups is None:
            return out
        groups, stacks = batch.adapter_groups, self.stacks
        flat, result = x.view(-1, self.in_features), out.view(-1, self._width)
        if groups.spans:
            down, ups = stacks.down.flatten(1, 2), stacks.ups
            for span in groups.spans:
                here, adapter_slot = slice(span.begin, span.end), span.adapter_slot
                self._add(result[here], flat[here] @ down[adapter_slot].T, [up[adapter_slot] for up in ups])
        if groups.scattered is None:
            return out
        if self._add_per_token is not None:
            self._add_per_token(flat, result, groups.scattered)
            return out
        pieces = torch.split(groups.scattered, max(1, GATHERED_BYTES // stacks.rows[0].nbytes))
        begin = 0
        for piece in pieces:
            here = slice(begin, begin := begin + len(piece))
            self._add_gathered(result[here], flat[here], stacks.gather(piece))
        return out

    def _add(self, result: Tensor, inner: Tensor, ups: Sequence[Tensor]) -> None:
        """Add each module's second product to its columns of result (T, outs); inner (T, M * rank)."""
        begin, rank = 0, inner.shape[1] // len(ups)
        for module, (up, out) in enumerate(zip(ups, self.out_features, strict=True)):
            result[:, begin : begin + out].addmm_(inner[:, module * rank : (module + 1) * rank], up)
            begin += out

    def _add_gathered(self, result: Tensor, x: Tensor, own: Stacks) -> None:
        """Add to each token of result (T, outs) the update of x (T, in) by its own weights."""
        inner = torch.bmm(x[:, None], own.down.flatten(1, 2).transpose(1, 2))  # (T, 1, M r)
        begin, rank = 0, own.rank
        for module, (up, out) in enumerate(zip(own.ups, self.out_features, strict=True)):
            columns = result[:, begin : begin + out][:, None]
            columns.baddbmm_(inner[:, :, module * rank : (module + 1) * rank], up)
            begin += out

    def room(self, weights: LoraWeights, *, adapter_slots: int) -> Stacks | None:
        """Return the weights of all adapters with room for `weights`: new tensors, where these are too small.

        None where this layer has no adapter. Nothing changes before `use`.
        """
        old = self.stacks
        if not weights:
            return (
                old if old is None or old.slots >= adapter_slots else self._resized(old.rank, adapter_slots)
            )
        like = next(iter(weights.values()))[0]
        rank = max(_padded_rank(_rank(weights), like.device), old.rank if old is not None else 1)
        if old is not None and old.slots >= adapter_slots and old.rank >= rank:
            return old
        return self._resized(rank, adapter_slots, like=like)

    def shrink(self, rank: int, *, adapter_slots: int) -> bool:
        """Give back what adapters in the first slots, of `rank` at most, do not need; whether they moved."""
        old = self.stacks
        if old is None or rank == 0:
            return self.use(None)
        rank = _padded_rank(rank, old.rows.device)
        if old.slots - adapter_slots <= _slots_step(old.slots):
            adapter_slots = old.slots
            rank = old.rank if 2 * rank > old.rank else rank
        if (old.slots, old.rank) == (adapter_slots, rank):
            return False
        try:
            smaller = self._resized(rank, adapter_slots)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False  # no room for the copy: these stay
        return self.use(smaller)

    def _resized(self, rank: int, adapter_slots: int, like: Tensor | None = None) -> Stacks:
        """Return other room of this size, with the adapters that are there; of the type of `like`."""
        old = self.stacks
        source = old.rows if old is not None else like
        assert source is not None, "no adapter says of what type they are"  # noqa: S101
        new = Stacks.zeros(source, adapter_slots, rank, (self.in_features, self.out_features))
        if old is not None:
            new.take(old)
        return new

    def use(self, stacks: Stacks | None) -> bool:
        """Compute with `stacks` from now on; return whether they lie elsewhere than before."""
        moved = stacks is not self.stacks
        self.stacks = stacks
        if moved and self._step.kernels is not None:
            self._add_per_token = None
            if stacks is not None:
                self._add_per_token = self._step.kernels.lora(stacks.down, stacks.ups)
        return moved


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """An adapter on the device, and the memory that it goes to."""

    adapter_slot: int
    layers: list[tuple[LoraLinear, LoraWeights, Stacks | None]]


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """Where one of the model's own linear modules lives: it is module `index` of `layer`."""

    layer: LoraLinear
    index: int


@dataclass(slots=True)
class ResidentAdapter:
    """A loaded adapter."""

    adapter_slot: int
    ranks: dict[LoraLinear, int]
    """Its largest rank in each layer, 0 where it has none."""


class AdapterStore:
    """Adapters by name; each has a version (never used twice) and an adapter slot (its row of weights)."""

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
        self.layout = 0
        """Counts how often weights moved: what was captured before reads others."""
        self._versions: dict[str, int] = {}
        self._next_version = itertools.count(1)
        self._residents: dict[int, ResidentAdapter] = {}
        """By version."""

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
        return group(self.slots(versions), device=self.device, per_token=self._per_token)

    def slots(self, versions: Sequence[int | None]) -> list[int]:
        """Return the adapter slots of tokens, given the adapter version of each or None."""
        return [
            NO_ADAPTER if version is None else self._residents[version].adapter_slot for version in versions
        ]

    def read(self, name: str, folder: Path, *, strength: float) -> AdapterWeights:
        """Return the adapter's weights by layer; ConfigError if they do not fit this model.

        Touches nothing that a step reads: any thread may call it.
        """
        weights: AdapterWeights = {}
        for path, pair in scaled_pairs(folder, name=name, strength=strength).items():
            target = self._targets.get(path)
            if target is None:
                raise failures.does_not_fit(name, f"no layer '{path}' to adapt here")
            down, up = self._converted(name, path, pair)
            if self._slice_adapter is not None:
                down, up = self._slice_adapter(path, down, up)
            expected = (target.layer.in_features, target.layer.out_features[target.index])
            if (down.shape[1], up.shape[0]) != expected:
                raise failures.does_not_fit(
                    name,
                    f"{path} maps {down.shape[1]} to {up.shape[0]} features, expected {expected[0]} to "
                    f"{expected[1]}",
                )
            weights.setdefault(target.layer, {})[target.index] = (down, up)
        return weights

    def _converted(self, name: str, path: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the weights in the model's type; ConfigError where they overflow in it."""
        down, up = (in_pieces(weights, self._dtype) for weights in pair)
        for weights, side in ((down, "A"), (up, "B")):
            if not_finite(weights):
                raise failures.does_not_fit(
                    name, f"{path}.lora_{side} times its scaling is not finite in {self._dtype}"
                )
        return down, up

    def stage(self, weights: AdapterWeights) -> StagedAdapter:
        """Copy what `read` returned to the device, and take the memory for it in every layer."""
        adapter_slot = 1 + len(self._residents)
        layers = []
        for layer in self._layers:
            own = {
                index: (down.to(self.device), up.to(self.device))
                for index, (down, up) in weights.get(layer, {}).items()
            }
            layers.append((layer, own, layer.room(own, adapter_slots=_padded_slots(adapter_slot))))
        return StagedAdapter(adapter_slot, layers)

    def add(self, name: str, staged: StagedAdapter) -> None:
        """Serve what `stage` returned under `name`; takes no memory, so it is in all layers or in none."""
        moved = False
        for layer, weights, stacks in staged.layers:
            if stacks is not None:
                stacks.put(staged.adapter_slot, weights)
            moved |= layer.use(stacks)
        self.layout += moved
        version = next(self._next_version)
        ranks = {layer: _rank(weights) for layer, weights, _ in staged.layers}
        self._residents[version] = ResidentAdapter(staged.adapter_slot, ranks)
        self._versions[name] = version

    def remove(self, name: str) -> int:
        """Drop an adapter that no sequence uses, and return its version.

        Memory that it alone needed is freed, and its weights become zeros where their memory stays.
        """
        version = self._versions.pop(name)
        freed = vacated = self._residents.pop(version).adapter_slot
        last = max(self._residents.values(), key=lambda each: each.adapter_slot, default=None)
        if last is not None and last.adapter_slot > freed:  # slots are those from 1 on, without a gap
            vacated = last.adapter_slot
            last.adapter_slot = freed
        for layer in self._layers:
            if layer.stacks is not None:
                layer.stacks.vacate(vacated, freed)
        slots, moved = _padded_slots(len(self._residents)), False
        for layer in self._layers:
            rank = max((resident.ranks[layer] for resident in self._residents.values()), default=0)
            moved |= layer.shrink(rank, adapter_slots=slots)
        self.layout += moved
        return version


def _rank(weights: LoraWeights) -> int:
    """Return the largest rank of an adapter in one layer; 0 where it has none."""
    return max((down.shape[0] for down, _ in weights.values()), default=0)


def _padded_rank(rank: int, device: torch.device) -> int:
    return rank if device.type == "cpu" else -(-rank // RANK_STEP) * RANK_STEP


def _padded_slots(adapters: int) -> int:
    """Return the slots for so many adapters, and for none."""
    step = _slots_step(1 + adapters)
    return -(-(1 + adapters) // step) * step


def _slots_step(slots: int) -> int:
    return SLOTS_STEP if slots <= LARGE_SLOTS_STEP else LARGE_SLOTS_STEP
