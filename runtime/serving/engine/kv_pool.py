"""The key-value pool: one arena of positions per kind of layer, in which every sequence has an extent.

Shapes: `P` positions of an arena, `K` key-value heads, `D` head dim; `N` flat tokens of a step. Takes the
place of the cache that transformers' models expect, and stores what they hand to `update`. Does not know
requests, nor which extent is whose (extents.py). Start at `KvPool`.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.memory.shape import dimensions, layer_windows
from runtime.models import context_tokens
from runtime.serving.engine.batch import Batch, StepContext
from runtime.serving.engine.extents import Move

PIECE = 4096
"""Positions that a move copies at a time where source and target overlap."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What layers that share an arena have in common."""

    window: int | None
    """A token sees so many positions, itself included; None sees all."""
    heads: int
    """K"""
    dim: int
    """D"""


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """The kinds of a model's layers, and the kind of each layer."""

    kinds: tuple[LayerKind, ...]
    of_layer: tuple[int, ...]
    """Index into `kinds`, by layer."""

    @classmethod
    def of(cls, config: Any) -> "LayerKinds":
        """Return those of a model; a window that holds its whole context is none."""
        text, longest = config.get_text_config().to_dict(), context_tokens(config)
        size = dimensions(text)
        layers = [
            LayerKind(window if window is None or window < longest else None, size.kv_heads, size.head_dim)
            for window in layer_windows(text)
        ]
        kinds = tuple(dict.fromkeys(layers))
        return cls(kinds, tuple(map(kinds.index, layers)))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each kind."""
        return tuple(kind.window for kind in self.kinds)


class KvPool:
    """Per layer, keys and values of shape (P, K, D), P of the layer's kind; filled in place."""

    is_compileable = False

    def __init__(
        self,
        step: StepContext,
        kinds: LayerKinds,
        *,
        positions: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Reserve zeros for `positions` of each kind: a hidden position may still count 0 times its value."""
        self.step, self.kinds = step, kinds
        self.scratch = tuple(positions)
        """The position of each arena that nobody owns: padding of a CUDA graph writes and reads there."""
        of_kind = [
            (count + 1, kind.heads, kind.dim) for count, kind in zip(positions, kinds.kinds, strict=True)
        ]
        shapes = [of_kind[kind] for kind in kinds.of_layer]
        self.keys = [_zeros(shape, dtype, device) for shape in shapes]
        self.values = [_zeros(shape, dtype, device) for shape in shapes]
        width = max(kind.heads * kind.dim for kind in kinds.kinds)
        self._piece = torch.empty(PIECE * width, dtype=dtype, device=device)
        """Where positions pass that are moved to overlapping ones: a move never runs out of memory."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values (1, K, N, D) in their extents and return them unchanged."""
        batch, kind = self.step.running, self.kinds.of_layer[layer_idx]
        store(self.keys[layer_idx], key[0].transpose(0, 1), batch, kind=kind)
        store(self.values[layer_idx], value[0].transpose(0, 1), batch, kind=kind)
        return key, value

    def move(self, moves: Iterable[Move]) -> None:
        """Copy positions within the arenas, one move after another; source and target may overlap."""
        for move in moves:
            for layer in self._of(move.kind):
                _copy(layer, move, self._piece)

    def clear(self, kind: int, start: int, count: int) -> None:
        """Zero `count` positions of arena `kind` from `start` on, after numbers that were not finite."""
        for layer in self._of(kind):
            layer[start : start + count].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come with every step, none is derived from the cache's length."""
        return 0

    def _of(self, kind: int) -> list[Tensor]:
        """Return the keys and values of all layers of `kind`."""
        layers = [index for index, each in enumerate(self.kinds.of_layer) if each == kind]
        return [tensor[index] for index in layers for tensor in (self.keys, self.values)]


def store(layer: Tensor, new: Tensor, batch: Batch, *, kind: int) -> None:
    """Write `new` (N, K, D) into `layer` (P, K, D), which is of `kind`, at the batch's positions."""
    layer.index_copy_(0, batch.ranges[kind].stores, new)


def _copy(layer: Tensor, move: Move, piece: Tensor) -> None:
    shift = abs(move.source - move.target)
    if shift >= move.count:
        layer[move.target : move.target + move.count] = layer[move.source : move.source + move.count]
        return
    begins = range(0, move.count, PIECE)
    for begin in begins if move.target < move.source else reversed(begins):
        count = min(PIECE, move.count - begin)
        source = layer[move.source + begin : move.source + begin + count]
        held = piece[: source.numel()].view(source.shape).copy_(source)
        layer[move.target + begin : move.target + begin + count] = held


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros (P, K, D); on a CPU they take memory only page by page, as they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    positions, heads, dim = shape
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # torch.zeros would write them all
    # a head's positions side by side: the kernels take 15 to 24 % longer for heads side by side
    return torch.frombuffer(pages, dtype=dtype).view(heads, positions, dim).transpose(0, 1)
