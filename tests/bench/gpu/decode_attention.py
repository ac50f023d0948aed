"""Step 6: the decode attention of one layer over ragged lengths: bytes of keys and values a second.

A step's attention has to read each sequence's keys and values once; the bandwidth of a copy is what that can
reach. "ours" is the form that the engine takes here; the others are beside it where the device has them. Each
is compared with float32, one sequence after another. Start at `run`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from runtime.serving.engine.attention import attend, layer_of
from runtime.serving.engine.attention_forms import AttentionLayer, choose
from runtime.serving.engine.batch import Batch, Form, HostBatch, HostRanges, StepContext, assemble
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_pool import KvPool, LayerKind, LayerKinds
from tests.bench.gpu.step import Context, Figures, NotHereError
from tests.serving.engine.attention_steps import Step, exact

ROWS = {"phi-3-mini": (32, 128), "tiny": (4,)}
HEADS = {"phi-3-mini": ((32, 32, 96), (32, 8, 128)), "tiny": ((4, 2, 32),)}
"""Query heads, key-value heads and head dim."""
LENGTHS = {"phi-3-mini": (500, 2048), "tiny": (30, 96)}
"""Median and maximum of the positions of a sequence, lognormal."""
SPLITS = {
    "phi-3-mini": ((32, 8, 128), (1, 8), (600, 8192), (4096, 32_768, 131_072)),
    "tiny": ((4, 2, 32), (1,), (60,), (256,)),
}
"""Heads, rows of equal length, their positions, and what a graph's longest sequence may be captured as."""
MOST_ERROR = 0.02


SPARE = 1.3
"""Capacity of a sequence's extent over what it holds."""
WAYS: tuple[Form, ...] = ("varlen", "efficient", "compiled", "plain")


@dataclass(frozen=True, slots=True)
class Ragged:
    """A layer's arena, and one new token of each sequence."""

    starts: list[int]
    lengths: list[int]
    pool: KvPool
    batch: Batch
    query: Tensor
    """(N, H, D)"""

    def layer(self, form: Form) -> AttentionLayer:
        """Return the layer as `form` has it."""
        self.pool.step.form = form
        return layer_of(self.pool, 0, scaling=self.query.shape[2] ** -0.5)

    @property
    def read_bytes(self) -> int:
        """Bytes of the keys and values that are seen."""
        keys = self.pool.keys[0]
        return 2 * sum(self.lengths) * keys.shape[1] * keys.shape[2] * keys.dtype.itemsize


def run(context: Context) -> None:
    """Measure every shape and number of rows."""
    for form in WAYS:
        for window in (None, 16):
            context.case(f"{form} of chunks, window {window}", partial(_chunks, context, form, window))
    copy = context.copy_gb_per_s()
    for queries, grouped, dim in HEADS[context.shape]:
        for rows in ROWS[context.shape]:
            made = _ragged(context, rows, (queries, grouped, dim))
            ours, name = _chosen(made), f"{rows} rows, {queries}/{grouped} x {dim}"
            expected = _reference(made)
            for way in (ours, *(each for each in WAYS if each != ours)):
                label = f"ours ({way})" if way == ours else way
                work = partial(_attend, context, made, way)
                context.case(f"{label}, {name}", partial(_measured, context, made, work, expected, copy=copy))
            del made, expected
            context.release()
    _splits(context, copy)


def _splits(context: Context, copy: float) -> None:
    """Measure a few equal rows under several bounds: FlashAttention splits a context by the bound, not by it.

    A graph is captured for the longest sequence that there may be, so a short one of few rows is not split.
    """
    heads, counts, positions, bounds = SPLITS[context.shape]
    for rows, length in itertools.product(counts, positions):
        made = _filled([length] * rows, heads, context)
        ours, expected = _chosen(made), _reference(made)
        for bound in (length, *(each for each in bounds if each > length)):
            ranges = tuple(replace(each, longest_decode=bound) for each in made.batch.ranges)
            bounded = replace(made, batch=replace(made.batch, ranges=ranges))
            work = partial(_attend, context, bounded, ours)
            name = f"{rows} x {length}, captured for {bound}"
            context.case(name, partial(_measured, context, bounded, work, expected, copy=copy))
        del made, expected
        context.release()


def _chunks(context: Context, form: Form, window: int | None) -> Figures:
    """Compare a form on decoding sequences and chunks, with sinks where it has them, with float64."""
    _check_here(context, form)
    device = torch.device(context.device)
    native = Kernels.find() if form == "compiled" else None
    sinks = torch.linspace(-3, 9, 8, device=device) if form in ("varlen", "plain") else None
    step = Step(form, heads=(8, 2, 64), window=window, native=native, dtype=context.dtype, device=device,
                sinks=sinks)  # fmt: skip
    expected = exact(step)
    error = float((step.attend().cpu().double() - expected).norm() / expected.norm())
    return {"output_error": error} | ({} if error <= MOST_ERROR else {"fault": f"{error:.2g} off"})


def _chosen(made: Ragged) -> Form:
    keys = made.pool.keys[0]
    capability = torch.cuda.get_device_capability() if keys.is_cuda else None
    kernels = made.pool.step.kernels
    return choose(LlamaConfig(), keys.dtype, dims=(keys.shape[2],), capability=capability, kernels=kernels)


def _attend(context: Context, made: Ragged, form: Form) -> Callable[[], Tensor]:
    """Return what attends by `form`."""
    _check_here(context, form)
    return partial(attend, made.query, made.layer(form), made.batch)


def _check_here(context: Context, form: Form) -> None:
    on_gpu = context.device == "cuda"
    if form == "compiled" and (on_gpu or context.dtype != torch.float32 or Kernels.find() is None):
        raise NotHereError("our kernels are for float32 on a CPU")
    if form in ("varlen", "efficient") and not on_gpu:
        raise NotHereError("a kernel of NVIDIA's GPUs")
    if form == "varlen" and torch.cuda.get_device_capability() < (8, 0):
        raise NotHereError("FlashAttention 2 needs a GPU of capability 8.0")


def _measured(
    context: Context,
    made: Ragged,
    way: Callable[[], Callable[[], Tensor]],
    expected: Tensor,
    *,
    copy: float,
) -> Figures:
    work = way()
    with torch.inference_mode():
        error = float((work().float() - expected).norm() / expected.norm())
        taken = context.milliseconds(lambda: [work() for _ in range(REPEATS)], warm=2) / REPEATS
    speed = made.read_bytes / taken / 1e6
    figures: Figures = {
        "ms": taken,
        "gb_per_s": speed,
        "roofline_gb_per_s": copy,
        "roofline_share": speed / copy,
        "positions": sum(made.lengths),
        "longest": max(made.lengths),
        "output_error": error,
    }
    if not error <= MOST_ERROR:
        figures["fault"] = f"the output is {error:.2g} off"
    return figures


REPEATS = 10
"""Calls without waiting for the device, as the layers of a step are."""


def _ragged(context: Context, rows: int, heads: tuple[int, int, int]) -> Ragged:
    median, longest = LENGTHS[context.shape]
    drawn = np.exp(np.log(median) + 0.6 * np.random.default_rng(rows).standard_normal(rows))
    return _filled([int(length) for length in np.clip(drawn, 8, longest - 1)], heads, context)


def _filled(lengths: list[int], heads: tuple[int, int, int], context: Context) -> Ragged:
    """Return an arena with sequences of these `lengths`, in a random order."""
    (queries, grouped, dim), rows = heads, len(lengths)
    draw = np.random.default_rng(rows)
    capacities = [int(length * SPARE) for length in lengths]
    starts, end = [0] * rows, 0
    for row in draw.permutation(rows):  # as sequences come and go
        starts[row], end = end, end + capacities[row]
    torch.manual_seed(rows)
    device = torch.device(context.device)
    on_cpu = device.type == "cpu" and context.dtype == torch.float32
    step = StepContext(Kernels.find() if on_cpu else None)
    kinds = LayerKinds((LayerKind(None, grouped, dim),), (0,))
    pool = KvPool(step, kinds, positions=[end], dtype=context.dtype, device=device)
    for states in (pool.keys[0], pool.values[0]):
        states.copy_(torch.randn(states.shape, device=device))
    query = torch.randn(rows, queries, dim, device=device).to(context.dtype)
    host = HostBatch(
        ids=[5] * rows,
        positions=[length - 1 for length in lengths],
        decode_tokens=rows,
        counts=[1] * rows,
        ranges=(HostRanges(starts, lengths),),
        logit_indices=list(range(rows)),
        adapters=[None] * rows,
        long=[False] * rows,
    )
    return Ragged(starts, lengths, pool, assemble(host, None, device=device), query)


def _reference(made: Ragged) -> Tensor:
    """Return the attention (N, H, D) in float32, one sequence after another."""
    group = made.query.shape[1] // made.pool.keys[0].shape[1]
    out = []
    for row, (start, length) in enumerate(zip(made.starts, made.lengths, strict=True)):
        keys, values = (
            states[0][start : start + length].float().repeat_interleave(group, dim=1)
            for states in (made.pool.keys, made.pool.values)
        )  # (L, H, D)
        scores = torch.einsum("hd,lhd->hl", made.query[row].float(), keys) * made.query.shape[2] ** -0.5
        out.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), values))
    return torch.stack(out)
