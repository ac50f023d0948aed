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
WINDOW = 8
"""Narrower than most documents."""
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
        limited = _reference(packs[0], window=WINDOW)
        for kernel in ("ours", "efficient"):
            work = partial(_compared, partial(_windowed, kernel), packs[0], limited)
            context.case(_label(f"{kernel}, window", heads), work)
    with cudnn_attention():
        for heads, (pack, *_) in made.items():
            measured = partial(_measured, context, _documents, [pack], _reference(pack))
            context.case(_label("documents, cuDNN on", heads), measured, needs_s=3)


def _label(name: str, heads: tuple[int, int, int]) -> str:
    return f"{name}, {heads[0]}/{heads[1]} x {heads[2]}"


def _compared(attend: Attention, pack: Pack, expected: Sequence[Tensor]) -> Figures:
    """Return the errors of the output and of the gradients of queries, keys and values."""
    states = (pack.query, pack.key, pack.value)
    out = attend(pack)
    found = (out, *torch.autograd.grad(out, states, torch.ones_like(out)))
    each = [
        float((ours.detach().float() - theirs).norm() / theirs.norm())
        for ours, theirs in zip(found, expected, strict=True)
    ]
    figures: Figures = {"output_error": each[0], "gradient_error": max(each[1:])}
    if not max(each) <= MOST_ERROR:  # NaN is a fault too
        figures["fault"] = f"output and gradients are {', '.join(f'{error:.2g}' for error in each)} off"
    return figures


def _measured(
    context: Context, attend: Attention, packs: Sequence[Pack], expected: Sequence[Tensor]
) -> Figures:
    """Return the first pass of each pack, the median of later ones, the kernels and the error."""
    first = [context.milliseconds(partial(_pass, attend, pack), repeats=1, warm=0) for pack in packs]
    later = context.milliseconds(lambda: [_pass(attend, pack) for pack in packs], warm=1) / len(packs)
    seen = trace(context, lambda: _pass(attend, packs[0]))
    figures: Figures = {
        "ms_per_pass": later,
        "first_ms": first[0],
        "first_of_last_pack_ms": first[-1],
        "launches": seen.launches,
        "tokens": sum(packs[0].lengths),
        "kernels": seen.kernels,
        **_compared(attend, packs[0], expected),
    }
    if seen.kernels:
        figures["kernel"] = next(iter(seen.kernels))[:40]
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
    return _each(pack, lambda length: None)


def _each(pack: Pack, mask: Callable[[int], Tensor | None]) -> Tensor:
    """One call for each document, under the mask of its length: a causal one where that is None."""
    grouped = pack.query.shape[1] != pack.key.shape[1]
    parts = [
        scaled_dot_product_attention(
            query, key, value, attn_mask=mask(query.shape[2]), is_causal=mask(1) is None, enable_gqa=grouped
        )
        for query, key, value in zip(
            *(torch.split(states, pack.lengths, dim=2) for states in (pack.query, pack.key, pack.value)),
            strict=True,
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _ours(pack: Pack, window: int | None = None) -> Tensor:
    """The tuner's attention, given what its batches hold."""
    lengths = collate(pack.rows, "packed", pad_id=0).document_lengths
    documents = packed_attention.Documents(lengths, pack.borders)
    out, _ = packed_attention.attention(
        torch.nn.Module(), pack.query, pack.key, pack.value, None, documents=documents, sliding_window=window
    )
    return out


def _windowed(kernel: str, pack: Pack) -> Tensor:
    return (_ours if kernel == "ours" else _efficient)(pack, WINDOW)


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


def _efficient(pack: Pack, window: int | None = None) -> Tensor:
    """The tuner's attention by the kernel that it takes on a V100."""
    _need_gpu(pack, (5, 0), "the memory-efficient kernel")
    documents = packed_attention.Documents(tuple(pack.lengths), pack.borders)
    rules = packed_attention.Rules(window=window)
    return packed_attention.varlen(*_flat(pack), documents=documents, rules=rules, kernel="efficient")[None]


def _need_gpu(pack: Pack, capability: tuple[int, int], what: str) -> None:
    if not pack.query.is_cuda or torch.cuda.get_device_capability() < capability:
        raise NotHereError(f"{what} needs a GPU of capability {capability[0]}.{capability[1]}")


VARIANTS: tuple[tuple[str, Attention], ...] = (
    ("ours", _ours),
    ("efficient", _efficient),
    ("varlen", _varlen),
    ("documents, cuDNN off", _documents),
)


def _reference(pack: Pack, window: int | None = None) -> tuple[Tensor, ...]:
    """Return the attention of each document alone in float32, by the kernel that writes the scores out.

    And the gradients of queries, keys and values, of the sum of all outputs.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def mask(length: int) -> Tensor | None:
        if window is None:
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=pack.query.device).tril()
        return causal & ~causal.tril(-window)

    states = [each.detach().float().requires_grad_() for each in (pack.query, pack.key, pack.value)]
    with sdpa_kernel(SDPBackend.MATH):
        out = _each(Pack(pack.rows, *states, pack.borders), mask)
    return (out.detach(), *torch.autograd.grad(out, states, torch.ones_like(out)))
