"""How much memory a server takes: weights, and keys and values for as many sequences as fit beside them.

The same arithmetic before a GPU is rented (`forecast`) and in the server itself (`sequences_that_fit`).
Does not know engines or requests. Start at `forecast`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from runtime import gpus, support
from runtime.errors import CapacityError
from runtime.hardware import Hardware, has_bfloat16
from runtime.memory.counting import CacheSize
from runtime.memory.shape import BYTES, Shape
from runtime.memory.tuning import CONSTANTS_4BIT, CONTEXT_BYTES, Basis, MemoryItem

CACHE_SHARE = 0.8
"""Part of the memory left beside the weights that keys and values may take; the rest is for a step's work."""
LEAST_CONTEXT_TOKENS = 2048
"""Fewer sequences at a time are preferred to a context below this."""
LEAST_TOKENS = 16
"""No sequence is served with less."""
GPU_SHARE = 0.97
"""Part of a GPU's memory that a server finds free before CUDA's context; the driver has the rest."""
HOST_SHARE = 0.5
"""Part of a CPU's memory that a server plans with: the page cache and the process live there too."""

DEQUANTISED = {"mxfp4", "fp8"}
"""Stored types that transformers turns into the compute type while it reads them: its own kernels need
triton 3.4 and the package `kernels`, and the image has neither (docs/decisions/021-no-triton.md)."""


@dataclass(frozen=True, slots=True)
class ServingRun:
    """What decides the memory of a server, beside the model."""

    sequences: int
    """Sequences generated at the same time."""
    context_tokens: int
    """Prompt and answer together, per request."""
    dtype: str
    engine: Literal["own", "vllm"] = "own"
    least_context_tokens: int = LEAST_CONTEXT_TOKENS
    """Fewer sequences are preferred to a context below this: the requested one, where there is a request."""
    bits: int | None = None
    double_quant: bool = False
    processes: int = 1
    """GPUs that one model is divided among (tensor parallelism); the plan is of one of them."""
    copies: int = 1
    """Copies of the model on this machine: on GPUs of their own, or in equal parts of a CPU's memory."""
    memory_share: float | None = None
    """Largest part of a GPU's memory in use, by whatever process."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The memory of a server, and how many sequences fit into it."""

    parts: tuple[MemoryItem, ...]
    """Weights and process; and the cache, when at least one sequence fits."""
    available_bytes: int
    token_bytes: int
    """Keys and values of one position of one sequence, as long as no window is full."""
    sequences: int
    """Sequences that fit, at `context_tokens` each; 0 when not even one does."""
    context_tokens: int

    @property
    def fits(self) -> bool:
        return self.sequences > 0


def forecast(shape: Shape, server: ServingRun, machine: Hardware) -> Capacity:
    """Return what `server` takes on one device of `machine`, and the sequences and context that fit there."""
    available = _available(server, machine)
    fixed: tuple[MemoryItem, ...] = (weights(shape, server),)
    shape = _held(shape, server)
    if machine.kind == "cuda":  # a CPU's other half has the process
        how = "with cuBLAS's workspace"
        fixed += (MemoryItem("CUDA context", CONTEXT_BYTES["cuda"], how, "estimated"),)
    free = available - sum(part.size_bytes for part in fixed)
    width = BYTES[server.dtype]
    size = shape.cache
    if batched(shape, server) and server.engine == "own":  # whose layers all keep every token
        size = CacheSize(token=size.token + size.window_token)
    token_bytes = (size.token + size.window_token) * width
    sequences, tokens = _that_fit(shape, server, size, free // width)
    if not sequences:
        return Capacity(fixed, available, token_bytes, 0, 0)
    cache = _kept(size, sequences, tokens, width)
    work = MemoryItem(
        "room for a step's work",
        free - cache.size_bytes,
        f"at least {1 - CACHE_SHARE:.0%} of the rest",
        "estimated",
    )
    return Capacity((*fixed, cache, work), available, token_bytes, sequences, tokens)


def _available(server: ServingRun, machine: Hardware) -> int:
    """Return the bytes that one process may plan with."""
    if machine.kind == "cpu":
        return int(machine.memory_bytes * HOST_SHARE / (server.processes * server.copies))
    unused = 1 - (server.memory_share or 1)
    if server.engine == "vllm":  # whose share is of what it takes itself
        return int(machine.memory_bytes * min(GPU_SHARE, 1 - unused))
    return int(machine.memory_bytes * max(0, GPU_SHARE - unused))


def _held(shape: Shape, server: ServingRun) -> Shape:
    """Return the shape of what each process holds."""
    if server.processes == 1:
        return shape
    return shape.shard(server.processes, embeddings=server.engine == "vllm")


def batched(shape: Shape, server: ServingRun) -> bool:
    """Whether the engine generates several sequences of the model at once; else one request at a time."""
    return server.engine == "vllm" or shape.family.engine is not None


def _that_fit(shape: Shape, server: ServingRun, size: CacheSize, free_values: int) -> tuple[int, int]:
    """Return (sequences, context tokens) of a cache of `size` in what is free, (0, 0) when none fits."""
    context = min(server.context_tokens, shape.context_tokens)
    room = max(0, int(free_values * CACHE_SHARE))
    if size == CacheSize(token=size.token) and size.token and batched(shape, server):
        try:
            return sequences_that_fit(
                (server.sequences, context),
                token_bytes=size.token,
                free_bytes=free_values,
                least_context=server.least_context_tokens,
            )
        except CapacityError:
            return 0, 0
    least = size.values(min(context, server.least_context_tokens))
    sequences = min(server.sequences, room // least) if batched(shape, server) else 1
    tokens = _longest(size, room // max(1, sequences), context)
    return (max(1, sequences), tokens) if tokens >= LEAST_TOKENS else (0, 0)


def _longest(size: CacheSize, values: int, limit: int) -> int:
    """Return the longest sequence, up to `limit`, whose cache has at most that many values."""
    left = values - size.sequence
    if left < 0:
        return 0
    within = left // max(1, size.token + size.window_token)
    if within < size.window or not size.window:
        return min(limit, within) if size.token + size.window_token else limit
    return min(limit, (left - size.window_token * size.window) // size.token if size.token else limit)


def _kept(size: CacheSize, sequences: int, tokens: int, width: int) -> MemoryItem:
    """Keys and values, and the states of layers that have those: sequences x numbers of each x b."""
    how = f"{sequences} sequences x {tokens} tokens x {size.token * width} bytes"
    if size.window_token:
        how += f", and {size.window_token * width} more for the last {size.window}"
    if size.sequence:
        how += f", and {size.sequence * width / 2**20:.1f} MiB of states"
    return MemoryItem("keys and values", sequences * size.values(tokens) * width, how)


def fits_on(shape: Shape, server: ServingRun) -> tuple[str, ...]:
    """Return the GPUs of clouds on which at least one sequence of the requested context fits, smallest first.

    Those that would compute in float16 are left out where the model does not stay within it.
    """
    context = min(server.context_tokens, shape.context_tokens, server.least_context_tokens)
    alone = replace(server, processes=1, copies=1)
    half = server.dtype != "float32" and not support.stays_within_float16(shape.model_type, training=False)
    return tuple(
        gpu.name
        for gpu in map(gpus.of_kind, gpus.rented())
        if not (half and not has_bfloat16(gpu)) and forecast(shape, alone, gpu).context_tokens >= context
    )


def weights(shape: Shape, server: ServingRun) -> MemoryItem:
    """Weights of one process: parameters x b; linear ones x bits / 8; the files' size where they stay so."""
    width, whole = BYTES[server.dtype], shape.parameters
    shape = _held(shape, server)
    if shape.quantized is not None and not (shape.quantized in DEQUANTISED and server.engine == "own"):
        basis: Basis = "stored" if shape.files_known else "estimated"
        return MemoryItem("weights", shape.stored_bytes, f"stored as {shape.quantized}", basis)
    if server.bits is None or shape.quantized is not None:
        count = shape.parameters
        part = f" of {whole / 1e9:.2f}B" if server.processes > 1 else ""
        how = f"{count / 1e9:.2f}B{part} x {width} bytes"
        if shape.quantized is not None:
            how += f", dequantised from the {shape.quantized} of the files"
        return MemoryItem("weights", count * width, how)
    each = server.bits / 8 + (CONSTANTS_4BIT[server.double_quant] if server.bits == 4 else 0)
    size = int(shape.linear_parameters * each + shape.other_parameters * width)
    linear, other = f"{shape.linear_parameters / 1e9:.2f}B", f"{shape.other_parameters / 1e6:.0f}M"
    how = f"{linear} x {each:.3f} + {other} x {width} bytes"
    return MemoryItem("weights", size, how)


def sequences_that_fit(
    wanted: tuple[int, int], *, token_bytes: int, free_bytes: int, least_context: int = LEAST_CONTEXT_TOKENS
) -> tuple[int, int]:
    """Return (sequences, context tokens) whose keys and values fit into CACHE_SHARE of `free_bytes`.

    Context gives way first, down to `least_context`, then the number of sequences, then context again.
    Raises CapacityError when not even one short sequence fits.
    """
    sequences, context = wanted
    tokens = max(0, int(free_bytes * CACHE_SHARE)) // token_bytes
    context = min(context, max(tokens // sequences, min(context, least_context)))
    sequences = max(1, min(sequences, tokens // context))
    context = min(context, tokens // sequences)
    if context < LEAST_TOKENS:
        raise CapacityError(
            f"{free_bytes >> 20} MiB are free beside the weights, and one sequence of {LEAST_TOKENS} tokens "
            f"needs {LEAST_TOKENS * token_bytes >> 20} MiB of keys and values; use a larger device or a "
            "quantised model"
        )
    return sequences, context
