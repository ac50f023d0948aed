"""Attention that keeps the documents of a pack apart: on a GPU one call for all of them, on a CPU one each.

With it packing wastes nothing on any hardware: no padding in the matrix products, and no T x T mask over a
pack. torch's operators are called themselves: `varlen_attn`, which wraps one of them, has other arguments in
each release and launches more. Does not know rows or batches. T tokens of the pack, H heads, K key-value
heads, D head dim. Start at `attention`.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runtime.attention import VarlenKernel, match_heads, varlen_kernel

log = logging.getLogger(__name__)

NAME = "documents"
"""What `model.set_attn_implementation` calls it, once `register` has run."""

_CAUSAL_FROM_TOP_LEFT = 1
"""The memory-efficient kernel's number for it (torch/nn/attention/bias.py, CausalVariant)."""


def register() -> None:
    """Make `NAME` known to transformers; calling it again changes nothing.

    Its table of masks has no such name: for those without, it makes no mask, and does not read the positions
    back from the device to find the documents.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a pack, end to end: made once for all layers of a pass."""

    lengths: tuple[int, ...]
    """Tokens of each: the host's own numbers, so that no layer asks a GPU for them."""
    borders: Tensor
    """(documents + 1,) int32, on the device: where each begins, and where the last ends."""

    @property
    def longest(self) -> int:
        return max(self.lengths)


def borders(lengths: tuple[int, ...]) -> Tensor:
    """Return where each document begins, and where the last ends; on the CPU."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a layer asks of its attention."""

    scale: float | None = None
    """Of the scores; None: 1 / sqrt(D)."""
    window: int | None = None
    """Most keys that a query sees, its own included."""
    dropout: float = 0.0


def attention(  # noqa: PLR0913 (transformers' signature)
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a pack.

    query (1, H, T, D); key and value (1, K, T, D). Returns (1, T, H, D) and no weights.
    """
    if softcap is not None:
        raise NotImplementedError("logit soft-capping inside packed attention")
    limited = bool(sliding_window) and documents.longest > (sliding_window or 0)
    rules = Rules(scaling, sliding_window if limited else None, dropout)
    kind = query.device.type
    if kind != "cpu" and torch.is_autocast_enabled(kind):  # as SDPA does by itself
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    capability = None if kind == "cpu" else torch.cuda.get_device_capability(query.device)
    kernel = varlen_kernel(query.dtype, query.shape[-1], capability=capability)
    if kernel is None:
        if kind != "cpu":
            _say_once(query.shape[-1], query.dtype)
        return each_document(query, key, value, documents=documents, rules=rules), None
    flat = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return varlen(*flat, documents=documents, rules=rules, kernel=kernel)[None], None


@functools.cache
def _say_once(head_dim: int, dtype: torch.dtype) -> None:
    log.warning(
        "no attention kernel of this GPU takes packed documents with heads of %d numbers in %s: one call "
        "for each document, which is slower", head_dim, str(dtype).removeprefix("torch."),
    )  # fmt: skip


def each_document(query: Tensor, key: Tensor, value: Tensor, *, documents: Documents, rules: Rules) -> Tensor:
    """Attend by a call for each document; query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
    key, value = match_heads(query, key, value, masked=rules.window is not None)
    grouped = query.shape[1] != key.shape[1]
    lengths = list(documents.lengths)
    parts = [
        scaled_dot_product_attention(
            q, k, v,
            attn_mask=_window(q.shape[2], rules.window, q.device),
            is_causal=not rules.window or q.shape[2] <= rules.window,
            dropout_p=rules.dropout, scale=rules.scale, enable_gqa=grouped,
        )
        for q, k, v in zip(
            *(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True
        )
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2)


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the (T, T) mask of a sliding window, or None where the window covers the document."""
    if not window or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None]
    return (distance >= 0) & (distance < window)


def varlen(  # noqa: PLR0913 (three tensors of one kind)
    query: Tensor, key: Tensor, value: Tensor, *, documents: Documents, rules: Rules, kernel: VarlenKernel
) -> Tensor:
    """Attend by one call of `kernel`; query (T, H, D), key and value (T, K, D) -> (T, H, D)."""
    operation = {"flash": _Flash, "efficient": _Efficient}[kernel]
    return operation.apply(query, key, value, documents, rules)  # type: ignore[no-any-return, no-untyped-call]


class _Flash(torch.autograd.Function):
    """FlashAttention 2; it reads each key-value head for a whole group of queries."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd takes tensors one by one
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rules: Rules
    ) -> Tensor:
        out, statistics, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, documents.borders, documents.borders, documents.longest, documents.longest,
            rules.dropout, rules.window is None, False, **_flash_options(rules),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, statistics, seed, offset)
        ctx.documents, ctx.rules = documents, rules
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, statistics, seed, offset = ctx.saved_tensors
        documents, rules = ctx.documents, ctx.rules
        grads = torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, out, statistics, documents.borders, documents.borders,
            documents.longest, documents.longest, rules.dropout, rules.window is None, seed, offset,
            **_flash_options(rules),
        )  # fmt: skip
        return (*grads, None, None)


def _flash_options(rules: Rules) -> dict[str, Any]:
    """Return the kernel's window: keys before a query's own and after it, -1 for any number of them."""
    before = -1 if rules.window is None else rules.window - 1
    return {"scale": rules.scale, "window_size_left": before, "window_size_right": 0}


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel, which has no groups: key-value heads are repeated for it."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd takes tensors one by one
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rules: Rules
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        longest = documents.longest
        out, statistics, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            query[None], _repeated(key, group), _repeated(value, group), None,
            documents.borders, documents.borders, longest, longest, rules.dropout,
            _CAUSAL_FROM_TOP_LEFT, True, **_efficient_options(rules),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, statistics, seed, offset)
        ctx.documents, ctx.rules = documents, rules
        return out[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, statistics, seed, offset = ctx.saved_tensors
        documents, rules = ctx.documents, ctx.rules
        group = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value, _ = torch.ops.aten._efficient_attention_backward(
            gradient[None], query[None], _repeated(key, group), _repeated(value, group), None, out,
            documents.borders, documents.borders, documents.longest, documents.longest, statistics,
            rules.dropout, seed, offset, _CAUSAL_FROM_TOP_LEFT, False, **_efficient_options(rules),
        )  # fmt: skip
        return grad_query[0], _summed(grad_key, group), _summed(grad_value, group), None, None


def _efficient_options(rules: Rules) -> dict[str, Any]:
    window = {} if rules.window is None else {"window_size": rules.window}
    return {"scale": rules.scale, **window}


def _repeated(states: Tensor, group: int) -> Tensor:
    """Return states (T, K, D) as (1, T, K · group, D)."""
    return (states if group == 1 else states.repeat_interleave(group, dim=1))[None]


def _summed(gradient: Tensor, group: int) -> Tensor:
    """Return the gradient of states (T, K, D) from that of `_repeated`."""
    return (
        gradient[0]
        if group == 1
        else gradient.reshape(gradient.shape[1], -1, group, gradient.shape[-1]).sum(2)
    )
