"""Which engine a model gets, and how large its key-value pool is.

Knows the settings, the model and the memory that is free beside it. Does not know requests. Start at
`create`.
"""

import logging
import sys
from typing import TYPE_CHECKING

from runtime import hardware, models
from runtime.memory.pool import (
    ArenaKind,
    PoolSize,
    beside,
    pool_that_fits,
    sampling_bytes,
    window_span,
)
from runtime.memory.serving import HOST_SHARE
from runtime.serving import fit
from runtime.serving.settings import ServeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runtime.serving.engine.cuda_graphs import GraphBackend
    from runtime.serving.engine.model_runner import Rank
    from runtime.serving.engine.protocol import Engine

log = logging.getLogger(__name__)

FUSED_TOKENS = 4
"""bitsandbytes multiplies 4-bit weights with so many tokens without dequantising them, on every GPU and in
every shape; with more only where its table says so (docs/decisions/)."""


def create(config: ServeConfig, model: "PreTrainedModel", *, rank: "Rank | None" = None) -> "Engine":
    """Return a running engine over `model`, already on its device and in evaluation mode.

    The batching engine where it can run the architecture, else the simple one, one request at a time. With a
    `rank` the model is rank 0's shard of one that several processes serve. Raises CapacityError when not even
    one sequence's cache fits beside the weights.
    """
    from runtime.serving.engine.patch import refusal

    stated = models.context_tokens(model.config)
    context_tokens = min(stated, config.limits.context_tokens or stated)
    if beyond := fit.beyond_the_model(config, stated):
        log.warning("%s", beyond)
    reason = refusal(model)
    if reason is not None:
        log.warning("Serving one request at a time: %s", reason)
        return _simple(config, model, context_tokens)
    return _batching(config, model, context_tokens, rank)


def _simple(config: ServeConfig, model: "PreTrainedModel", context_tokens: int) -> "Engine":
    from runtime.serving.engine.backends.simple import SimpleEngine
    from runtime.serving.engine.rope import short_tokens

    short = short_tokens(model.config.get_text_config()) or context_tokens
    if short < context_tokens:
        log.warning(
            "Serving %d of %d context tokens: longrope needs the batching engine", short, context_tokens
        )
    return SimpleEngine(model, context_tokens=min(short, context_tokens), max_waiting=config.limits.queue)


def _batching(
    config: ServeConfig, model: "PreTrainedModel", context_tokens: int, rank: "Rank | None"
) -> "Engine":
    from runtime.serving.engine.engine import BatchingEngine, EngineLimits

    processes = config.replicas if rank is None else rank.group.world
    free = free_bytes(model, processes=processes, memory_share=config.limits.gpu_memory_share)
    if rank is not None:
        free = rank.group.all_reduce_min(free)
    kinds = pool_kinds(model)
    rows = config.limits.rows_on(model.device.type)
    free = beside(sampling_bytes(rows, model.config.get_text_config().vocab_size), free)
    size = pool_that_fits(kinds, rows=rows, context_tokens=context_tokens, free_bytes=free)
    _say_size(size, kinds)
    if size.context_tokens < context_tokens:
        log.warning(
            "Memory allows requests of %d tokens, prompt and answer together, not %d",
            size.context_tokens,
            context_tokens,
        )
    limits = EngineLimits(
        max_sequences=size.rows,
        context_tokens=size.context_tokens,
        positions=size.positions,
        max_waiting=config.limits.queue,
        draft_tokens=draft_tokens(config, model.device.type),
    )
    graph_backend = _graph_backend(config, model) if rank is None else None
    return BatchingEngine(model, limits, rank=rank, graph_backend=graph_backend)


def draft_tokens(config: ServeConfig, device: str) -> int:
    """Return the most drafts of a step on a `device` of this type: so many that a pass costs little more."""
    if config.quantization is None:
        return config.speculative_tokens
    if config.quantization.bits != 4:
        return 0
    # on a CPU bitsandbytes does the same for one token as for many
    return min(config.speculative_tokens, FUSED_TOKENS - 1 if device == "cuda" else sys.maxsize)


def _graph_backend(config: ServeConfig, model: "PreTrainedModel") -> "GraphBackend | None":
    from runtime.serving.engine.cuda_graphs import CudaGraphs

    # a product of 8-bit weights asks on the host which columns are outliers
    waits = config.quantization is not None and config.quantization.bits == 8
    return CudaGraphs() if model.device.type == "cuda" and config.cuda_graphs and not waits else None


def pool_kinds(model: "PreTrainedModel") -> tuple[ArenaKind, ...]:
    """Return what a position takes in each kind of the model's layers."""
    from runtime.serving.engine.kv_pool import LayerKinds

    found = LayerKinds.of(model.config)
    width = 2 * int(model.dtype.itemsize)
    return tuple(
        ArenaKind(
            found.of_layer.count(index) * kind.heads * kind.dim * width,
            kind.window,
            None if kind.window is None else window_span(kind.window),
        )
        for index, kind in enumerate(found.kinds)
    )


def _say_size(size: PoolSize, kinds: tuple[ArenaKind, ...]) -> None:
    parts = [
        f"{count} tokens"
        + (
            f" in layers that see {kind.window}"
            if kind.window
            else " in layers that see all" * (len(kinds) > 1)
        )
        + f" ({kind.token_bytes * count / 2**30:.1f} GiB)"
        for count, kind in zip(size.positions, kinds, strict=True)
    ]
    log.info(
        "Key-value pool: %s, for up to %d sequences of up to %d tokens",
        ", ".join(parts),
        size.rows,
        size.context_tokens,
    )


def free_bytes(model: "PreTrainedModel", *, processes: int = 1, memory_share: float | None = None) -> int:
    """Return the memory beside the weights, on the device of `model`; `processes` share a host's memory.

    Of a GPU's memory no more than `memory_share` shall be in use, by whatever process.
    """
    import torch

    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        return within_share(*torch.cuda.mem_get_info(model.device), share=memory_share or 1)
    host = int(hardware.host().memory_bytes * HOST_SHARE / processes)
    return max(0, host - int(model.get_memory_footprint()))


def within_share(free_bytes: int, total_bytes: int, *, share: float) -> int:
    """Return what may be used of the free bytes of a device, so that `share` of all is in use at most."""
    return max(0, int(free_bytes - (1 - share) * total_bytes))
