"""Attention that keeps packed documents apart on any hardware: one SDPA call per document.

With it packing wastes nothing even without flash-attention: no padding in the matrix products, and no
T x T mask over a pack in the attention. Does not know rows or batches. T tokens of the pack, H heads,
K key-value heads, D head dim. Start at `attention`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.attention import match_heads

if TYPE_CHECKING:
    import torch

NAME = "documents"
"""What `model.set_attn_implementation` calls it, once `register` has run."""


def register() -> None:
    """Make `NAME` known to transformers; calling it again changes nothing.

    Its table of masks has no such name: for those without, it makes no mask, and does not read the positions
    back from the device to find the documents.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def attention(  # noqa: PLR0913 (transformers' signature)
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    *,
    document_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> "tuple[torch.Tensor, None]":
    """Causal attention inside each document of a pack.

    query (1, H, T, D); key and value (1, K, T, D); document_lengths, T together, are the host's own numbers.
    Returns (1, T, H, D) and no weights.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if softcap is not None:
        raise NotImplementedError("logit soft-capping inside packed attention")
    lengths = list(document_lengths)
    limited = bool(sliding_window) and max(lengths) > (sliding_window or 0)
    key, value = match_heads(query, key, value, masked=limited)
    grouped = query.shape[1] != key.shape[1]
    parts = [
        scaled_dot_product_attention(
            q, k, v,
            attn_mask=_window(q.shape[2], sliding_window, q.device),
            is_causal=not sliding_window or q.shape[2] <= sliding_window,
            dropout_p=dropout, scale=scaling, enable_gqa=grouped,
        )
        for q, k, v in zip(
            *(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True
        )
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _window(length: int, window: int | None, device: "torch.device") -> "torch.Tensor | None":
    """Return the (T, T) mask of a sliding window, or None where the window covers the document."""
    import torch

    if not window or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None]
    return (distance >= 0) & (distance < window)
