"""Keys and values of every row: one slot per row, all slots of a layer in one tensor.

Shapes: `S` slots, `K` key-value heads, `L` positions, `D` head dim; `N` flat tokens of a step. Stands
where transformers' models expect their cache and stores what they hand to `update`. Does not know
requests. Start at `SlotCache.update`.
"""

import torch
from torch import Tensor

from runtime.serving.engine.batch import Batch


class SlotCache:
    """Per layer, keys and values of shape (S, K, L, D), filled in place."""

    is_compileable = False

    def __init__(
        self, layers: int, *, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve the memory; on a CPU pages are taken only as they are written.

        Zeroed, because a hidden position still takes part as 0 times its value, and 0 times NaN is NaN.
        """
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
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

    def clear(self, slot: int) -> None:
        """Zero a slot, after a row whose numbers were not finite."""
        for layer in (*self.keys, *self.values):
            layer[slot].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come with every step, none is derived from the cache's length."""
        return 0


def store(layer: Tensor, new: Tensor, batch: Batch) -> None:
    """Write `new` (N, K, D) into `layer` (S, K, L, D) at the batch's slots and positions."""
    if batch.decodes:
        layer[batch.slots, :, batch.places] = new[: batch.decodes]
    for chunk in batch.chunks:
        target = layer[chunk.slot, :, chunk.start : chunk.start + chunk.count]
        target.copy_(new[chunk.offset : chunk.offset + chunk.count].transpose(0, 1))
