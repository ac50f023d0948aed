"""Attention that keeps packed documents apart on any hardware: one SDPA call per document.

With it packing wastes nothing even without flash-attention: no padding in the matrix products, and no
T x T mask over a pack in the attention. Does not know rows or batches. T tokens of the pack, H heads,
K key-value heads, D head dim. Start at `attention`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "documents"
"""What `model.set_attn_implementation` calls it, once `register` has run."""


def register() -> None:
    """Make `NAME` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: the documents' borders are passed as cu_seq_lens_q."""


def attention(  # noqa: PLR0913 (transformers' signature)
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    *,
    cu_seq_lens_q: "torch.Tensor",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> "tuple[torch.Tensor, None]":
    """Causal attention inside each document of a pack.

    query (1, H, T, D); key and value (1, K, T, D); cu_seq_lens_q (documents + 1,) borders.
    Returns (1, T, H, D) and no weights.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if softcap is not None:
        raise NotImplementedError("logit soft-capping inside packed attention")
    lengths = cu_seq_lens_q.diff().tolist()
    key, value = _repeated(key, query), _repeated(value, query)
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


def _repeated(states: "torch.Tensor", query: "torch.Tensor") -> "torch.Tensor":
    """Return keys or values (1, K, T, D), one head for each of `query`'s where SDPA's kernels want it.

    On a CPU they do not. On a GPU only flash attention, from compute capability 8.0 on, takes fewer: with
    enable_gqa any other ends in the kernel that writes all T x T weights out.
    """
    import torch

    heads = query.shape[1] // states.shape[1]
    if heads == 1 or states.device.type == "cpu":
        return states
    flash = query.dtype != torch.float32 and torch.cuda.get_device_capability(states.device) >= (8, 0)
    return states if flash else states.repeat_interleave(heads, dim=1)


def _window(length: int, window: int | None, device: "torch.device") -> "torch.Tensor | None":
    """Return the (T, T) mask of a sliding window, or None where the window covers the document."""
    import torch

    if not window or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None]
    return (distance >= 0) & (distance < window)
