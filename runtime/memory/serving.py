"""How much memory a server takes: weights, and keys and values of as many tokens as fit beside them.

The same arithmetic before a GPU is rented (`forecast`) and in the server itself (pool.py). Does not know
engines or requests. Start at `forecast`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from runtime import gpus, support
from runtime.errors import CapacityError
from runtime.hardware import Hardware, has_bfloat16
from runtime.memory.pool import (
    CACHE_SHARE,
    SAMPLING_BYTES,
    ArenaKind,
    PoolSize,
    beside,
    pool_that_fits,
    sampling_bytes,
    scored_tokens,
    window_span,
)
from runtime.memory.shape import BYTES, Shape
from runtime.memory.tuning import CONSTANTS_4BIT, CONTEXT_BYTES, Basis, MemoryItem

LEAST_CONTEXT_TOKENS = 2048
"""A machine whose memory holds no request of this length is not proposed, where none is stated."""
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
    """Sequences generated at the same time, at most."""
    context_tokens: int
    """Prompt and answer together, per request, at most."""
    dtype: str
    engine: Literal["own", "vllm"] = "own"
    least_context_tokens: int = LEAST_CONTEXT_TOKENS
    """What a machine must hold to be proposed: the requested context, where there is a request."""
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
    """The memory of a server, and how many tokens of keys and values fit into it."""

    parts: tuple[MemoryItem, ...]
    """Weights and process; and the pool of keys and values, where one sequence fits."""
    available_bytes: int
    token_bytes: int
    """Keys and values of one position of one sequence, as long as no window is full."""
    pool: PoolSize | None
    """None where not even one sequence fits."""

    @property
    def fits(self) -> bool:
        return self.pool is not None

    @property
    def sequences(self) -> int:
        """Sequences at the same time, at most; 0 where none fits."""
        return self.pool.rows if self.pool is not None else 0

    @property
    def context_tokens(self) -> int:
        """The longest sequence."""
        return self.pool.context_tokens if self.pool is not None else 0

    @property
    def cache_tokens(self) -> int:
        """Tokens of all sequences together, as long as no window is full."""
        return self.pool.tokens if self.pool is not None else 0


def forecast(shape: Shape, server: ServingRun, machine: Hardware) -> Capacity:
    """Return what `server` takes on one device of `machine`, and the sequences and context that fit there."""
    available = _available(server, machine)
    fixed: tuple[MemoryItem, ...] = (weights(shape, server),)
    shape = _held(shape, server)
    if machine.kind == "cuda":  # a CPU's other half has the process
        how = "with cuBLAS's workspace"
        fixed += (MemoryItem("CUDA context", CONTEXT_BYTES["cuda"], how, "estimated"),)
    free = available - sum(part.size_bytes for part in fixed)
    kinds, sequence_bytes = _kinds(shape, server)
    token_bytes = sum(kind.token_bytes for kind in kinds)
    rows = server.sequences if batched(shape, server) else 1
    chosen = _chosen(shape, server, rows)
    try:
        pool = pool_that_fits(
            kinds,
            rows=rows,
            context_tokens=min(server.context_tokens, shape.context_tokens),
            free_bytes=beside(chosen.size_bytes, free),
            sequence_bytes=sequence_bytes,
        )
    except CapacityError:
        return Capacity(fixed, available, token_bytes, None)
    cache = _kept(kinds, pool, sequence_bytes)
    work = MemoryItem(
        "room for a step's work",
        free - cache.size_bytes,
        f"at least {1 - CACHE_SHARE:.0%} of the rest{chosen.how}",
        "estimated",
    )
    return Capacity((*fixed, cache, work), available, token_bytes, pool)


def _chosen(shape: Shape, server: ServingRun, rows: int) -> MemoryItem:
    """What choosing tokens takes of a step's work, by this project's engines."""
    if server.engine == "vllm":
        return MemoryItem("sampling", 0, "")
    vocabulary = shape.dimensions.vocabulary
    size = sampling_bytes(rows, vocabulary)
    factors = f"{scored_tokens(rows)} x {vocabulary} x {SAMPLING_BYTES} bytes"
    how = f", {size / 2**30:.1f} GiB of it to choose tokens: {factors}"
    return MemoryItem("sampling", size, how)


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


def _kinds(shape: Shape, server: ServingRun) -> tuple[tuple[ArenaKind, ...], int]:
    """Return the kinds of layers, and the bytes of the states that a sequence has beside keys and values."""
    size, width = shape.cache, BYTES[server.dtype]
    kinds = [ArenaKind(size.token * width)] if size.token else []
    if size.window_token and size.window < shape.context_tokens:
        own = batched(shape, server) and server.engine == "own"
        span = window_span(size.window) if own else size.window
        kinds.append(ArenaKind(size.window_token * width, size.window, span))
    elif size.window_token:
        kinds = [ArenaKind((size.token + size.window_token) * width)]
    return tuple(kinds), size.sequence * width


def _kept(kinds: tuple[ArenaKind, ...], pool: PoolSize, sequence_bytes: int) -> MemoryItem:
    """Keys and values, and the states of layers that have those: tokens x numbers of each x b."""
    parts = [
        f"{count} tokens x {kind.token_bytes} bytes"
        + (f" in windows of {kind.window}" if kind.window else "")
        for count, kind in zip(pool.positions, kinds, strict=True)
    ]
    if sequence_bytes:
        parts.append(f"{pool.rows} sequences x {sequence_bytes / 2**20:.1f} MiB of states")
    total = sum(count * kind.token_bytes for count, kind in zip(pool.positions, kinds, strict=True))
    return MemoryItem("keys and values", total + pool.rows * sequence_bytes, ", and ".join(parts))


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
