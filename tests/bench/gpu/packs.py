"""Step 3: the attention of packed documents, forward and backward, by each way that torch offers.

Three packs of 40 documents each, no two lengths alike, so that the first pass shows what a backend spends on
a shape that it has not met. Start at `run`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runtime.tuning.data.batching import collate
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.model import packed_attention
from tests.bench.gpu.step import Context, Figures, NotHereError, cudnn_attention
from tests.bench.gpu.traces import trace

PACKS = 3
DOCUMENTS = {"phi-3-mini": 40, "tiny": 6}
MOST_ERROR = 0.02
HEADS = {"phi-3-mini": ((32, 32, 96), (32, 8, 128)), "tiny": ((4, 4, 32), (4, 2, 32))}
"""Query heads, key-value heads and head dim: plain, and grouped as Llama's."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Documents end to end, and random states for them."""

    rows: tuple[TokenizedSequence, ...]
    query: Tensor
    """(1, H, T, D)"""
    key: Tensor
    """(1, K, T, D)"""
    value: Tensor
    borders: Tensor
    """(documents + 1,) int32"""

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


Attention = Callable[[Pack], Tensor]
"""Returns (1, T, H, D)."""


def run(context: Context) -> None:
    """Measure every way on the same packs; with cuDNN last, and on one pack: building its plans is slow."""
    made = {heads: [_pack(context, heads, seed) for seed in range(PACKS)] for heads in HEADS[context.shape]}
    for heads, packs in made.items():
        _pass(_documents, _pack(context, heads, PACKS))  # what a process sets up once is no backend's
        expected = _reference(packs[0])
        for name, attend in VARIANTS:
            measured = partial(_measured, context, attend, packs, expected)
            context.case(_label(name, heads), measured, needs_s=3)
    with cudnn_attention():
        for heads, (pack, *_) in made.items():
            measured = partial(_measured, context, _documents, [pack], _reference(pack))
            context.case(_label("documents, cuDNN on", heads), measured, needs_s=3)


def _label(name: str, heads: tuple[int, int, int]) -> str:
    return f"{name}, {heads[0]}/{heads[1]} x {heads[2]}"


def _measured(context: Context, attend: Attention, packs: Sequence[Pack], expected: Tensor) -> Figures:
    """Return the first pass of each pack, the median of later ones, the kernels and the error."""
    first = [context.milliseconds(partial(_pass, attend, pack), repeats=1, warm=0) for pack in packs]
    later = context.milliseconds(lambda: [_pass(attend, pack) for pack in packs], warm=1) / len(packs)
    seen = trace(context, lambda: _pass(attend, packs[0]))
    with torch.no_grad():
        off = attend(packs[0]).float() - expected
    error = float(off.norm() / expected.norm())
    figures: Figures = {
        "ms_per_pass": later,
        "first_ms": first[0],
        "first_of_last_pack_ms": first[-1],
        "launches": seen.launches,
        "output_error": error,
        "tokens": sum(packs[0].lengths),
        "kernels": seen.kernels,
    }
    if seen.kernels:
        figures["kernel"] = next(iter(seen.kernels))[:40]
    if not error <= MOST_ERROR:
        figures["fault"] = f"the output is {error:.2g} off"
    return figures


def _pack(context: Context, heads: tuple[int, int, int], seed: int) -> Pack:
    queries, grouped, dim = heads
    draw = np.random.default_rng(seed)
    middle = 12 if context.is_tiny else 180
    drawn = np.sort(np.exp(np.log(middle) + 0.8 * draw.standard_normal(DOCUMENTS[context.shape])))
    sizes: list[int] = []
    for size in drawn.astype(int) // PACKS * PACKS + seed:  # other lengths than any other pack's
        sizes.append(max(int(size), sizes[-1] + PACKS if sizes else PACKS))
    rows = tuple(TokenizedSequence(np.full(size, 5, np.int32), np.ones(size, np.bool_)) for size in sizes)
    total = sum(sizes)
    torch.manual_seed(seed)
    states = [
        torch.randn(1, count, total, dim, device=context.device).to(context.dtype).requires_grad_()
        for count in (queries, grouped, grouped)
    ]
    borders = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=context.device)
    return Pack(rows, states[0], states[1], states[2], borders)


def _pass(attend: Attention, pack: Pack) -> None:
    out = attend(pack)
    out.backward(torch.ones_like(out))


def _documents(pack: Pack) -> Tensor:
    """One call for each document, as torch's own choice of backend is."""
    grouped = pack.query.shape[1] != pack.key.shape[1]
    parts = [
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        for query, key, value in zip(
            *(torch.split(states, pack.lengths, dim=2) for states in (pack.query, pack.key, pack.value)),
            strict=True,
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _ours(pack: Pack) -> Tensor:
    """The tuner's attention, given what its batches hold."""
    lengths = collate(pack.rows, "packed", pad_id=0).document_lengths
    out, _ = packed_attention.attention(
        torch.nn.Module(), pack.query, pack.key, pack.value, None, document_lengths=lengths
    )
    return out


def _flat(pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states as (T, heads, D)."""
    query, key, value = (states[0].transpose(0, 1) for states in (pack.query, pack.key, pack.value))
    return query, key, value


def _varlen(pack: Pack) -> Tensor:
    """One call of FlashAttention for all documents; torch 2.11 groups heads without being told."""
    _need_gpu(pack, (8, 0), "FlashAttention 2")
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    known = inspect.signature(varlen_attn).parameters
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    query, key, value = _flat(pack)
    longest, borders = max(pack.lengths), pack.borders
    out = varlen_attn(query, key, value, borders, borders, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None]


def _efficient(pack: Pack) -> Tensor:
    """One call of the memory-efficient kernel, on a V100 too; it has no grouped heads."""
    _need_gpu(pack, (5, 0), "the memory-efficient kernel")
    query, key, value = (states[None] for states in _flat(pack))
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    longest = max(pack.lengths)
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, pack.borders, pack.borders, longest, longest, 0.0, 1, True
    )[0]
    return out


def _need_gpu(pack: Pack, capability: tuple[int, int], what: str) -> None:
    if not pack.query.is_cuda or torch.cuda.get_device_capability() < capability:
        raise NotHereError(f"{what} needs a GPU of capability {capability[0]}.{capability[1]}")


VARIANTS: tuple[tuple[str, Attention], ...] = (
    ("ours", _ours),
    ("efficient", _efficient),
    ("varlen", _varlen),
    ("documents, cuDNN off", _documents),
)


def _reference(pack: Pack) -> Tensor:
    """Return the attention of each document alone in float32, by the kernel that writes the scores out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    whole = Pack(
        pack.rows, *(states.detach().float() for states in (pack.query, pack.key, pack.value)), pack.borders
    )
    with sdpa_kernel(SDPBackend.MATH):
        return _documents(whole)
