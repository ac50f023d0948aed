"""Runs one step of the model: a plan in, the logits of the rows that choose a token out.

Knows the model and its cache, not requests or sampling. Start at `ModelRunner.run`.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime import hardware
from runtime.errors import ConfigError
from runtime.memory.shape import dimensions
from runtime.serving.engine.batch import Batch, HostBatch, assemble, describe
from runtime.serving.engine.cuda_graphs import GraphBackend, GraphCache
from runtime.serving.engine.kernels import WIDTH, Kernels
from runtime.serving.engine.kv_cache import SlotCache
from runtime.serving.engine.layers import LayerFactory
from runtime.serving.engine.linear import LinearLayouts
from runtime.serving.engine.lora import AdapterStore, StepContext
from runtime.serving.engine.parallel.group import Add, Begin, Clear, End, Group, Remove
from runtime.serving.engine.parallel.shard import Shard
from runtime.serving.engine.patch import UNSCALED, prepare
from runtime.serving.engine.rope import short_tokens
from runtime.serving.engine.scheduler import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecoderForward:
    """Runs a model whose layers are: norm, attention, add, norm, MLP, add."""

    def __init__(self, model: "PreTrainedModel") -> None:
        decoder: Any = model.get_decoder()
        self._embed: nn.Module = decoder.embed_tokens
        self._angles: nn.Module = decoder.rotary_emb
        self._layers = [
            (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
            for layer in decoder.layers
        ]
        self._norm: nn.Module = decoder.norm
        self._head = model.get_output_embeddings()

    def run(self, batch: Batch) -> Tensor:
        """Return logits (C, V) of the batch's chosen tokens; (0, 1) when there are none."""
        hidden: Tensor = self._embed(batch.ids)  # (1, N, hidden)
        angles = self._angles(hidden, batch.positions)
        update = None
        for before, attention, after, mlp in self._layers:
            hidden, normed = before.after(hidden, update)
            hidden, normed = after.after(hidden, attention(normed, angles)[0])
            update = mlp(normed)
        if not batch.chosen.numel():  # all tokens are the middle of prompts
            return hidden.new_empty(0, 1)
        # every step runs its last norm on the chosen tokens alone
        last = hidden[0, batch.chosen]
        if update is not None:
            last += update[0, batch.chosen]
        logits: Tensor = self._head(self._norm(last))
        return logits


log = logging.getLogger(__name__)

SPARE = 10
"""A model this many times smaller than the host's memory is laid out twice on a CPU."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A process's place among those that serve one model together."""

    team: Group
    share: Shard
    dismiss: Callable[[], None] = lambda: None
    """Waits for the other processes to end; rank 0's."""


class ModelRunner:
    """A model prepared for rows; it belongs to this runner from then on.

    With a `membership` the model is a share: what rank 0's runner does, those of the others do too.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        rows: int,
        positions: int,
        membership: Rank | None = None,
        recorder: GraphBackend | None = None,
    ) -> None:
        """Record steps with `recorder` where there is one."""
        layers, heads, dim = cache_shape(model.config)
        self._team = membership.team if membership is not None else None
        self._tell(Begin(rows, positions))
        self._model = model
        self._short_tokens = short_tokens(model.config.get_text_config())
        kernels = _find_kernels(model)
        self._step = StepContext(kernels)
        self.cache = SlotCache(
            layers,
            shape=(rows, heads, positions, dim),
            dtype=model.dtype,
            device=model.device,
            kernels=kernels,
        )
        linears = LayerFactory(
            self._step, LinearLayouts(twice=_is_small(model), kernels=kernels), team=self._team
        )
        prepare(model, self.cache, linears)
        self._trunk = DecoderForward(model) if model.config.model_type in UNSCALED else None
        cut = membership.share.cut_adapter if membership is not None else None
        self.bank = AdapterStore(
            linears.parts, dtype=model.dtype, device=model.device, cut=cut, own=kernels is not None
        )
        self._recordings = None
        if recorder is not None:
            self._recordings = GraphCache(
                self._forward, self.bank, slots=rows, positions=positions, recorder=recorder
            )
        # a ready-made mask, so that no model builds one: the attention of rows makes its own
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device, dtype=model.dtype)

    def is_long(self, positions: int) -> bool:
        """Whether a row that will fill so many `positions` needs rotary factors for long contexts."""
        return self._short_tokens is not None and positions > self._short_tokens

    def run(self, plan: StepPlan) -> Tensor:
        """Run `plan` and return logits (R + C, V): its decoding rows, then its chunks that end a prompt."""
        work = describe(plan)
        self._tell(work)
        return self._execute(work)

    def add_adapter(self, name: str, folder: Path, strength: float) -> None:
        """Read an adapter on every rank, or on none; ConfigError when it does not fit."""
        self._tell(Add(name, str(folder), strength))
        self._add(name, folder, strength)

    def remove_adapter(self, name: str) -> int:
        """Forget an adapter, and return the version it had."""
        self._tell(Remove(name))
        return self._remove(name)

    def clear(self, slot: int, start: int) -> None:
        """Zero a slot of the cache from position `start` on."""
        self._tell(Clear(slot, start))
        self.cache.clear(slot, start)

    def follow(self) -> None:
        """Do what rank 0 does until it ends."""
        assert self._team is not None, "nobody to follow"  # noqa: S101
        while not isinstance(order := self._team.hear(), End):
            if isinstance(order, HostBatch):
                self._execute(order)
            elif isinstance(order, Add):
                with contextlib.suppress(ConfigError):  # rank 0 reads the same file and says so
                    self._add(order.name, Path(order.folder), order.strength)
            elif isinstance(order, Remove):
                self._remove(order.name)
            elif isinstance(order, Clear):
                self.cache.clear(order.slot, order.start)

    def _tell(self, order: Any) -> None:
        if self._team is not None and self._team.rank == 0:
            self._team.tell(order)

    def _add(self, name: str, folder: Path, strength: float) -> None:
        weights = None
        try:
            weights = self.bank.read(name, folder, strength=strength)
        finally:
            everywhere = self._team is None or self._team.least(int(weights is not None))
        if not everywhere or weights is None:
            raise ConfigError(f"adapter {name}: another process of this server could not read it")
        self.bank.add(name, weights)
        if self._recordings is not None:
            self._recordings.forget()

    def _remove(self, name: str) -> int:
        if self._recordings is not None:
            self._recordings.forget()
        return self.bank.remove(name)

    @torch.inference_mode()
    def _execute(self, work: HostBatch) -> Tensor:
        for source, target, count in work.copies:
            self.cache.copy(source, target, count)
        logits = self._recordings.run(work) if self._recordings is not None else None
        return self._forward(assemble(work, self.bank)) if logits is None else logits

    def _forward(self, batch: Batch) -> Tensor:
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


def _find_kernels(model: "PreTrainedModel") -> Kernels | None:
    """Return the compiled kernels for `model`, or None: on a GPU, for other types and sizes, or not built."""
    config = model.config.get_text_config()
    _, _, dim = cache_shape(model.config)
    sizes = (config.hidden_size, getattr(config, "intermediate_size", WIDTH), dim)
    is_plain = model.device.type == "cpu" and model.dtype == torch.float32
    if not is_plain or any(size % WIDTH for size in sizes):
        return None
    found = Kernels.find()
    if found is None:
        log.warning(
            "Without compiled kernels, serving on a CPU is slower: install a C compiler, then this again"
        )
    return found


def _is_small(model: "PreTrainedModel") -> bool:
    """Whether the host has memory to spare for a second copy of the weights."""
    return int(model.get_memory_footprint()) * SPARE <= hardware.detect().memory_bytes


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Return (layers, key-value heads, head dim) of a model with this configuration."""
    size = dimensions(config.get_text_config().to_dict())
    return size.layers, size.kv_heads, size.head_dim
