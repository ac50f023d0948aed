"""Runs one step of the model: a plan in, the logits of the tokens after which one is sampled out.

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

from runtime import families, hardware
from runtime.errors import CapacityError, ConfigError, is_out_of_memory
from runtime.memory.pool import PoolSize
from runtime.memory.shape import dimensions
from runtime.serving.engine import failures
from runtime.serving.engine.attention_forms import choose
from runtime.serving.engine.batch import Batch, HostBatch, StepContext, assemble, describe
from runtime.serving.engine.cuda_graphs import GraphBackend, GraphCache, StepBounds
from runtime.serving.engine.extents import Move
from runtime.serving.engine.kernels import WIDTH, Kernels
from runtime.serving.engine.kv_pool import KvPool, LayerKinds
from runtime.serving.engine.layers import LayerFactory
from runtime.serving.engine.linear import LinearLayouts
from runtime.serving.engine.lora import AdapterStore, AdapterWeights, StagedAdapter
from runtime.serving.engine.out_of_memory import free_memory
from runtime.serving.engine.parallel.group import (
    AddAdapter,
    ClearPositions,
    Group,
    MovePositions,
    RemoveAdapter,
    Stop,
)
from runtime.serving.engine.parallel.shard import Shard
from runtime.serving.engine.patch import prepare
from runtime.serving.engine.rope import short_tokens
from runtime.serving.engine.scheduler import Sequence, StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecoderForward:
    """Runs a model whose layers are: norm, attention, add, norm, MLP, add."""

    def __init__(self, model: "PreTrainedModel") -> None:
        decoder: Any = model.get_decoder()
        self._embed: nn.Module = decoder.embed_tokens
        self._rope: nn.Module = decoder.rotary_emb
        self._layers = [
            (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
            for layer in decoder.layers
        ]
        self._norm: nn.Module = decoder.norm
        self._head = model.get_output_embeddings()

    def run(self, batch: Batch) -> Tensor:
        """Return logits (C, V) of the batch's `logit_indices`; (0, 1) when there are none."""
        hidden: Tensor = self._embed(batch.ids)  # (1, N, hidden)
        cos_sin = self._rope(hidden, batch.positions)
        update = None
        for before, attention, after, mlp in self._layers:
            hidden, normed = before.add(hidden, update)
            hidden, normed = after.add(hidden, attention(normed, cos_sin)[0])
            update = mlp(normed)
        if not batch.logit_indices.numel():  # all tokens are the middle of prompts
            return hidden.new_empty(0, 1)
        # the last norm and the head run on these tokens alone
        last = hidden[0, batch.logit_indices]
        if update is not None:
            last += update[0, batch.logit_indices]
        logits: Tensor = self._head(self._norm(last))
        return logits


log = logging.getLogger(__name__)

SPARE = 10
"""A model this many times smaller than the host's memory is laid out twice on a CPU."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank of a group that serves a model together has: its connection and its shard."""

    group: Group
    shard: Shard
    wait: Callable[[], None] = lambda: None
    """Waits for the other processes to end; rank 0's."""


class ModelRunner:
    """A model prepared for sequences in a key-value pool; it belongs to this runner from then on.

    With a `rank` the model is a shard: what rank 0's runner does, those of the others do too.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        size: PoolSize,
        *,
        rank: Rank | None = None,
        graph_backend: GraphBackend | None = None,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """Serve sequences in a pool of `size`, their decode steps captured by `graph_backend`, if any.

        `capability` is the GPU's compute capability; None on a CPU, or to ask the model's device.
        """
        self._group = rank.group if rank is not None else None
        self._broadcast(size)
        self._model = model
        self._short_tokens = short_tokens(model.config.get_text_config())
        kinds = LayerKinds.of(model.config)
        self._step = _context(model, kinds, capability or _capability(model.device))
        self.cache = KvPool(
            self._step, kinds, positions=size.positions, dtype=model.dtype, device=model.device
        )
        self.adapters = self._patch(rank)
        is_decoder = families.find(model.config.model_type).engine == "decoder"
        self._decoder = DecoderForward(model) if is_decoder else None
        self._graphs: GraphCache | None = None
        gathers = self._step.form == "plain" and model.device.type == "cuda"  # up to the graph's bound
        if graph_backend is not None and not gathers:
            bounds = StepBounds(size.rows, size.context_tokens, is_long=self._short_tokens is not None)
            self._graphs = GraphCache(self._forward, self.adapters, self.cache, bounds, backend=graph_backend)
        # a ready-made mask, so that no model builds one: the engine's attention makes its own
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device, dtype=model.dtype)
        if self._graphs is not None:
            self._graphs.capture()

    def _patch(self, rank: Rank | None) -> AdapterStore:
        """Replace the model's layers by those of this engine, and return the store of their adapters."""
        model, kernels = self._model, self._step.kernels
        layouts = LinearLayouts(twice=_is_small(model), kernels=kernels)
        layers = LayerFactory(self._step, layouts, group=self._group)
        prepare(model, self.cache, layers)
        return AdapterStore(
            layers.targets,
            dtype=model.dtype,
            device=model.device,
            slice_adapter=rank.shard.slice_adapter if rank is not None else None,
            per_token=kernels is not None,
        )

    def is_long(self, positions: int) -> bool:
        """Whether a sequence that will fill so many `positions` needs rotary factors for long contexts."""
        return self._short_tokens is not None and positions > self._short_tokens

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> Tensor:
        """Run `plan` and return logits (C + S, V): decoding sequences, drafts, ends of prompts, S scored

        Ids below 0 are those of `chosen`, on the device (`HostBatch.ids`). Only a GPU's work is still to do
        when this returns; the next run may write its logits where these are.
        """
        host = describe(plan, self.cache.kinds.windows)
        self._broadcast(host)
        return self._execute(host, chosen)

    def read_adapter(self, name: str, folder: Path, strength: float) -> AdapterWeights | None:
        """Return what `add_adapter` takes, in any thread; None where there are ranks, which read it there.

        ConfigError when it does not fit this model, CapacityError when the host has no memory for it.
        """
        return self._read(name, folder, strength) if self._group is None else None

    def add_adapter(
        self, name: str, folder: Path, strength: float, *, weights: AdapterWeights | None = None
    ) -> None:
        """Take an adapter on every rank, or on none; `weights` are those that were read, if they were.

        ConfigError when it does not fit this model or the name is in use, CapacityError when a rank has no
        memory for it.
        """
        if name in self.adapters.names:
            raise failures.already_loaded(name)
        self._broadcast(AddAdapter(name, str(folder), strength))
        self._add(name, folder, strength, weights)

    def remove_adapter(self, name: str) -> int:
        """Drop an adapter, and return the version it had."""
        self._broadcast(RemoveAdapter(name))
        return self._remove(name)

    def free_memory(self) -> None:
        """Give back what torch keeps of memory that is free, after a pass that ran out of it."""
        free_memory(self.adapters.device)

    def move(self, moves: tuple[Move, ...]) -> None:
        """Copy within the pool, before a step that reads and writes at the new places."""
        if moves:
            self._broadcast(MovePositions(moves))
            self._move(moves)

    def clear(self, sequence: Sequence, start: int = 0) -> None:
        """Zero the extents of `sequence` from its position `start` on."""
        for kind, extent in enumerate(sequence.extents):
            passed = max(0, start - extent.base)
            command = ClearPositions(kind, extent.start + passed, extent.capacity - passed)
            self._broadcast(command)
            self.cache.clear(command.kind, command.start, command.count)

    def run_commands(self) -> None:
        """Run what rank 0 broadcasts until it says `Stop`."""
        assert self._group is not None, "no rank 0"  # noqa: S101
        while not isinstance(command := self._group.receive(), Stop):
            if isinstance(command, HostBatch):
                self._execute(command)
            elif isinstance(command, AddAdapter):
                with contextlib.suppress(ConfigError, CapacityError):  # rank 0 reports what any rank met
                    self._add(command.name, Path(command.folder), command.strength)
            elif isinstance(command, RemoveAdapter):
                self._remove(command.name)
            elif isinstance(command, MovePositions):
                self._move(command.moves)
            elif isinstance(command, ClearPositions):
                self.cache.clear(command.kind, command.start, command.count)

    def _broadcast(self, command: Any) -> None:
        if self._group is not None and self._group.rank == 0:
            self._group.broadcast(command)

    def _add(self, name: str, folder: Path, strength: float, weights: AdapterWeights | None = None) -> None:
        staged = None
        try:
            weights = self._read(name, folder, strength) if weights is None else weights
            staged = self._stage(name, weights)
        finally:
            # a failed rank raises its own failure; the others must not wait for it in a step
            ready = staged is not None
            on_every_rank = self._group is None or self._group.all_reduce_min(int(ready))
        if not on_every_rank or staged is None:
            raise failures.unread_elsewhere(name)
        self.adapters.add(name, staged)
        if self._graphs is not None:
            self._graphs.follow_adapters()

    def _read(self, name: str, folder: Path, strength: float) -> AdapterWeights:
        try:
            return self.adapters.read(name, folder, strength=strength)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        raise failures.no_memory_for_adapter(name)

    def _stage(self, name: str, weights: AdapterWeights) -> StagedAdapter:
        """Return the adapter, for which all memory is taken; CapacityError where there is too little."""
        try:
            return self.adapters.stage(weights)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.free_memory()  # not in the handler: the traceback holds what was read
        raise failures.no_memory_for_adapter(name)

    def _remove(self, name: str) -> int:
        version = self.adapters.remove(name)
        if self._graphs is not None:
            self._graphs.follow_adapters()
        return version

    @torch.inference_mode()
    def _move(self, moves: tuple[Move, ...]) -> None:
        self.cache.move(moves)

    @torch.inference_mode()
    def _execute(self, host: HostBatch, chosen: Tensor | None = None) -> Tensor:
        logits = self._graphs.run(host, chosen) if self._graphs is not None else None
        if logits is not None:
            return logits
        groups = self.adapters.group(host.adapters)
        return self._forward(assemble(host, groups, device=self.adapters.device, chosen=chosen))

    def _forward(self, batch: Batch) -> Tensor:
        self._step.batch = batch
        try:
            return self._decoder.run(batch) if self._decoder is not None else self._run_model(batch)
        finally:
            self._step.batch = None

    def _run_model(self, batch: Batch) -> Tensor:
        """Run the model through its own `forward`."""
        count = batch.logit_indices.numel()
        indices = batch.logit_indices if count else batch.ids.new_zeros(1)
        output = self._model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=self._no_mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=indices,
        )
        logits: Tensor = output.logits[0]
        return logits[:count]


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _context(model: "PreTrainedModel", kinds: LayerKinds, capability: tuple[int, int] | None) -> StepContext:
    kernels, dims = _find_kernels(model), tuple(kind.dim for kind in kinds.kinds)
    form = choose(model.config, model.dtype, dims=dims, capability=capability, kernels=kernels)
    return StepContext(kernels, form)


def _find_kernels(model: "PreTrainedModel") -> Kernels | None:
    """Return the compiled kernels for `model`, or None: on a GPU, for other types and sizes, or not built."""
    config = model.config.get_text_config()
    dim = dimensions(config.to_dict()).head_dim
    sizes = (config.hidden_size, getattr(config, "intermediate_size", WIDTH), dim)
    is_plain = model.device.type == "cpu" and model.dtype == torch.float32
    if not is_plain or any(size % WIDTH for size in sizes):
        return None
    kernels = Kernels.find()
    if kernels is None:
        log.warning(
            "Without compiled kernels, serving on a CPU is slower: install a C compiler, then this again"
        )
    return kernels


def _is_small(model: "PreTrainedModel") -> bool:
    """Whether the host has memory to spare for a second copy of the weights."""
    return int(model.get_memory_footprint()) * SPARE <= hardware.host().memory_bytes
