"""Runs one step of the model: a plan in, the logits of the rows that choose a token out.

Knows the model and its cache, not requests or sampling. Start at `Runner.run`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime import hardware
from runtime.memory.shape import dimensions
from runtime.serving.engine.angles import short_tokens
from runtime.serving.engine.bank import Bank
from runtime.serving.engine.batch import Batch, assemble
from runtime.serving.engine.blocks import Adaptables
from runtime.serving.engine.cache import SlotCache
from runtime.serving.engine.fuse import UNSCALED, prepare
from runtime.serving.engine.linears import Layouts
from runtime.serving.engine.lora import Step
from runtime.serving.engine.scheduler import Plan
from runtime.serving.engine.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPARE = 10
"""A model this many times smaller than the host's memory is laid out twice on a CPU."""


class Runner:
    """A model prepared for rows; it belongs to this runner from then on."""

    def __init__(self, model: "PreTrainedModel", *, rows: int, positions: int) -> None:
        layers, heads, dim = cache_shape(model.config)
        self._model = model
        self._short_tokens = short_tokens(model.config.get_text_config())
        self._step = Step()
        self.cache = SlotCache(
            layers,
            shape=(rows, heads, positions, dim),
            dtype=model.dtype,
            device=model.device,
        )
        linears = Adaptables(self._step, Layouts(twice=_is_small(model)))
        prepare(model, self.cache, linears)
        self._trunk = Trunk(model) if model.config.model_type in UNSCALED else None
        self.bank = Bank(linears.parts, dtype=model.dtype, device=model.device)
        # a ready-made mask, so that no model builds one: the attention of rows makes its own
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device, dtype=model.dtype)

    def is_long(self, positions: int) -> bool:
        """Whether a row that will fill so many `positions` needs rotary factors for long contexts."""
        return self._short_tokens is not None and positions > self._short_tokens

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Run `plan` and return logits (R + C, V): its decoding rows, then its chunks that end a prompt."""
        for copy in plan.copies:
            self.cache.copy(copy.source, copy.row.slot, copy.count)
        batch = assemble(plan, self.bank)
        self.cache.batch, self._step.groups = batch, batch.groups
        try:
            return self._trunk.run(batch) if self._trunk is not None else self._whole(batch)
        finally:
            self.cache.batch = self._step.groups = None

    def _whole(self, batch: Batch) -> Tensor:
        """Run a model through its own `forward`."""
        chosen = batch.chosen if batch.chosen.numel() else batch.ids.new_zeros(1)
        output = self._model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=self._no_mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=chosen,
        )
        logits: Tensor = output.logits[0]
        return logits[: batch.chosen.numel()]


def _is_small(model: "PreTrainedModel") -> bool:
    """Whether the host has memory to spare for a second copy of the weights."""
    return int(model.get_memory_footprint()) * SPARE <= hardware.detect().memory_bytes


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Return (layers, key-value heads, head dim) of a model with this configuration."""
    size = dimensions(config.get_text_config().to_dict())
    return size.layers, size.kv_heads, size.head_dim
