"""Keys and values of every row: one slot per row, all slots of a layer in one tensor.

Shapes: `S` slots, `K` key-value heads, `L` positions, `D` head dim; `N` flat tokens of a step. Stands
where transformers' models expect their cache and stores what they hand to `update`. Does not know
requests. Start at `SlotCache.update`.
"""

import math
import mmap

import torch
from torch import Tensor

from runtime.serving.engine.batch import Batch
from runtime.serving.engine.kernels import Kernels


class SlotCache:
    """Per layer, keys and values of shape (S, K, L, D), filled in place."""

    is_compileable = False

    def __init__(
        self,
        layers: int,
        *,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        """Reserve zeros: a hidden position still counts 0 times its value, and 0 times NaN is NaN.

        `kernels` read and write it on a CPU.
        """
        self.kernels = kernels
        self.keys = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.batch: Batch | None = None
        """The step under way; set by the runner."""

    @property
    def running(self) -> Batch:
        """The step under way."""
        if self.batch is None:
            raise RuntimeError("the model was called outside a step of its engine")
        return self.batch

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values (1, K, N, D) in their rows' slots and return them unchanged."""
        store(self.keys[layer_idx], key[0].transpose(0, 1), self.running)
        store(self.values[layer_idx], value[0].transpose(0, 1), self.running)
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
    if batch.decodes:
        layer[batch.slots[: batch.decodes], :, batch.places] = new[: batch.decodes]
    for chunk in batch.chunks:
        target = layer[chunk.slot, :, chunk.start : chunk.start + chunk.count]
        target.copy_(new[chunk.offset : chunk.offset + chunk.count].transpose(0, 1))
