"""Which engine a model gets, and how many sequences of which length.

Knows the settings, the model and the memory that is free beside it. Does not know requests. Start at
`create`.
"""

import logging
from typing import TYPE_CHECKING

from runtime import hardware, models
from runtime.memory.serving import HOST_SHARE, LEAST_CONTEXT_TOKENS, sequences_that_fit
from runtime.serving import fit
from runtime.serving.settings import ServeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runtime.serving.engine.cuda_graphs import GraphBackend
    from runtime.serving.engine.model_runner import Rank
    from runtime.serving.engine.protocol import Engine

log = logging.getLogger(__name__)


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
    wanted = (config.limits.rows, context_tokens)
    sequences, context_tokens = sequences_that_fit(
        wanted,
        token_bytes=_token_bytes(model),
        free_bytes=free,
        least_context=config.limits.context_tokens or LEAST_CONTEXT_TOKENS,
    )
    if (sequences, context_tokens) != wanted:
        log.warning(
            "Memory allows %d sequences of %d tokens, not %d of %d", sequences, context_tokens, *wanted
        )
    limits = EngineLimits(
        max_sequences=sequences,
        context_tokens=context_tokens,
        max_waiting=config.limits.queue,
        # a product of 4-bit weights with more than one token dequantises them first
        draft_tokens=0 if config.quantization else config.speculative_tokens,
    )
    graph_backend = _graph_backend(config, model) if rank is None else None
    return BatchingEngine(model, limits, rank=rank, graph_backend=graph_backend)


def _graph_backend(config: ServeConfig, model: "PreTrainedModel") -> "GraphBackend | None":
    from runtime.serving.engine.cuda_graphs import CudaGraphs

    # a product of 8-bit weights asks on the host which columns are outliers
    waits = config.quantization is not None and config.quantization.bits == 8
    return CudaGraphs() if model.device.type == "cuda" and config.cuda_graphs and not waits else None


def _token_bytes(model: "PreTrainedModel") -> int:
    """Return the bytes of keys and values of one position of one sequence."""
    from runtime.serving.engine.model_runner import cache_shape

    layers, heads, dim = cache_shape(model.config)
    return 2 * layers * heads * dim * int(model.dtype.itemsize)


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
