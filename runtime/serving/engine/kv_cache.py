"""The key-value cache: one slot per sequence, all slots of a layer in one tensor.

Shapes: `S` slots, `K` key-value heads, `L` positions, `D` head dim; `N` flat tokens of a step. Takes the
place of the cache that transformers' models expect, and stores what they hand to `update`. Does not know
requests. Start at `SlotCache.update`.
"""

import math
import mmap

import torch
from torch import Tensor

from runtime.serving.engine.batch import Batch, StepContext


class SlotCache:
    """Per layer, keys and values of shape (S, K, L, D), filled in place."""

    is_compileable = False

    def __init__(
        self,
        layers: int,
        step: StepContext,
        *,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Reserve zeros: a hidden position still counts 0 times its value, and 0 times NaN is NaN."""
        self.step = step
        self.keys = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(layers)]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values (1, K, N, D) in their slots and return them unchanged."""
        batch = self.step.running
        store(self.keys[layer_idx], key[0].transpose(0, 1), batch)
        store(self.values[layer_idx], value[0].transpose(0, 1), batch)
        return key, value

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of one slot to another, in every layer."""
        for layer in (*self.keys, *self.values):
            layer[target, :, :count] = layer[source, :, :count]

    def clear(self, slot: int, start: int) -> None:
        """Zero a slot from position `start` on, after numbers that were not finite."""
        for layer in (*self.keys, *self.values):
            layer[slot, :, start:].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come with every step, none is derived from the cache's length."""
        return 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU they take memory only page by page, as they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # torch.zeros would write them all
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def store(layer: Tensor, new: Tensor, batch: Batch) -> None:
    """Write `new` (N, K, D) into `layer` (S, K, L, D) at the batch's slots and positions."""
    if count := batch.decode_tokens:
        layer[batch.slots[:count], :, batch.decode_positions] = new[:count]
    for chunk in batch.chunks:
        target = layer[chunk.slot, :, chunk.start : chunk.start + chunk.count]
        target.copy_(new[chunk.offset : chunk.offset + chunk.count].transpose(0, 1))
