"""Step 6: the decode attention of one layer over ragged lengths: bytes of keys and values a second.

A step's attention has to read each sequence's keys and values once; the bandwidth of a copy is what that can
reach. Beside the engine's own there is FlashAttention over extents of one arena. Start at `run`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from runtime.serving.engine.kv_cache import SlotCache
from torch import Tensor

from runtime.serving.engine.attention import AttentionLayer, attend
from runtime.serving.engine.batch import Batch, HostBatch, StepContext, assemble
from tests.bench.gpu.step import Context, Figures, NotHereError

ROWS = {"phi-3-mini": (32, 128), "tiny": (4,)}
HEADS = {"phi-3-mini": ((32, 32, 96), (32, 8, 128)), "tiny": ((4, 2, 32),)}
"""Query heads, key-value heads and head dim."""
LENGTHS = {"phi-3-mini": (500, 2048), "tiny": (30, 96)}
"""Median and maximum of the positions of a sequence, lognormal."""
MOST_ERROR = 0.02


@dataclass(frozen=True, slots=True)
class Ragged:
    """A layer's cache, and one new token of each sequence."""

    lengths: list[int]
    cache: SlotCache
    layer: AttentionLayer
    batch: Batch
    query: Tensor
    """(N, H, D)"""

    @property
    def read_bytes(self) -> int:
        """Bytes of the keys and values that are seen."""
        keys = self.layer.keys
        return 2 * sum(self.lengths) * keys.shape[1] * keys.shape[3] * keys.dtype.itemsize


def run(context: Context) -> None:
    """Measure every shape and number of rows."""
    copy = context.copy_gb_per_s()
    for queries, grouped, dim in HEADS[context.shape]:
        for rows in ROWS[context.shape]:
            made = _ragged(context, rows, (queries, grouped, dim))
            name = f"{rows} rows, {queries}/{grouped} x {dim}"
            expected = _reference(made)
            ours = partial(attend, made.query, made.layer, made.batch)
            for way, work in (("ours", ours), ("varlen", _varlen(made))):
                context.case(f"{way}, {name}", partial(_measured, context, made, work, expected, copy=copy))
            del made, expected, ours, work
            context.release()


def _measured(
    context: Context, made: Ragged, work: Callable[[], Tensor], expected: Tensor, *, copy: float
) -> Figures:
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
    queries, grouped, dim = heads
    median, longest = LENGTHS[context.shape]
    draw = np.random.default_rng(rows)
    drawn = np.exp(np.log(median) + 0.6 * draw.standard_normal(rows))
    lengths = [int(length) for length in np.clip(drawn, 8, longest - 1)]
    torch.manual_seed(rows)
    shape = (rows, grouped, longest, dim)
    device = torch.device(context.device)
    cache = SlotCache(1, StepContext(), shape=shape, dtype=context.dtype, device=device)
    for states in (cache.keys[0], cache.values[0]):
        states.copy_(torch.randn(shape, device=device))
    query = torch.randn(rows, queries, dim, device=device).to(context.dtype)
    host = HostBatch(
        ids=[5] * rows,
        positions=[length - 1 for length in lengths],
        decode_slots=list(range(rows)),
        chunks=(),
        logit_indices=list(range(rows)),
        adapters=[None] * rows,
        long=[False] * rows,
        copies=[],
    )
    batch = assemble(host, None, device=device)
    return Ragged(lengths, cache, AttentionLayer.of(cache, 0, scaling=dim**-0.5), batch, query)


def _reference(made: Ragged) -> Tensor:
    """Return the attention (N, H, D) in float32, one sequence after another."""
    group = made.query.shape[1] // made.layer.keys.shape[1]
    out = []
    for row, length in enumerate(made.lengths):
        keys, values = (
            states[row, :, :length].float().repeat_interleave(group, dim=0)
            for states in (made.layer.keys, made.layer.values)
        )  # (H, L, D)
        scores = torch.einsum("hd,hld->hl", made.query[row].float(), keys) * made.layer.scaling
        out.append(torch.einsum("hl,hld->hd", scores.softmax(-1), values))
    return torch.stack(out)


def _varlen(made: Ragged) -> Callable[[], Tensor]:
    """Return FlashAttention over an arena (positions, K, D), of which each sequence has an extent."""
    query = made.query
    if not query.is_cuda or torch.cuda.get_device_capability() < (8, 0):
        return _no_flash
    rows, _, most, _ = made.layer.keys.shape
    keys, values = (
        states.transpose(1, 2).flatten(0, 1).contiguous() for states in (made.layer.keys, made.layer.values)
    )  # (S * L, K, D)
    starts_q = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    starts_k = starts_q * most
    lengths = torch.tensor(made.lengths, dtype=torch.int32, device=query.device)
    longest = max(made.lengths)

    def work() -> Tensor:
        # by its operator: varlen_attn of torch 2.11 has no `seqused_k`
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query, keys, values, starts_q, starts_k, 1, longest, 0.0, False, False,
            scale=made.layer.scaling, window_size_left=-1, window_size_right=-1, seqused_k=lengths,
        )[0]  # fmt: skip
        return out

    return work


def _no_flash() -> Tensor:
    raise NotHereError("FlashAttention 2 needs a GPU of capability 8.0")
