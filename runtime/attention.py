"""Which of torch's attention kernels a call takes: what SDPA would choose badly, and which ones take packs.

Imports torch where it is used. Does not know models, batches or caches. Start at `disable_cudnn`,
`match_heads` and `varlen_kernel`.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

VarlenKernel = Literal["flash", "efficient"]
"""torch's kernels for sequences end to end: FlashAttention 2 and the memory-efficient one."""

FLASH_CAPABILITY = (8, 0)
FLASH_DIM = 256
"""The largest head dim of FlashAttention 2."""
HEAD_BYTES = 16
"""Both kernels load a head in pieces of this size."""


def disable_cudnn() -> None:
    """Keep cuDNN's attention out of this process; each one that attends calls this as it begins.

    torch prefers it on compute capability 9.0 and newer. It plans for every new shape and stride, which takes
    55 ms to 1 s: for nearly every document of a pack and every length of a prompt.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def match_heads(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", *, masked: bool
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return key and value (B, K, L, D) with the heads that SDPA should get for query (B, H, T, D).

    As they are on a CPU, and where flash attention takes the call: it reads each head for a whole group of
    queries, but no mask (`masked`). Else repeated to H heads: with fewer, any other call ends in the kernel
    that writes all T x L weights out.
    """
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    heads = query.shape[1] // key.shape[1]
    if heads == 1 or query.device.type == "cpu":
        return key, value
    if not masked and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, True)):
        return key, value
    return key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)


def varlen_kernel(
    dtype: "torch.dtype", head_dim: int, *, capability: tuple[int, int] | None
) -> VarlenKernel | None:
    """Return the kernel that attends in sequences of any lengths by one call, on a GPU of this `capability`.

    None on a CPU (without one), and where neither takes such heads or numbers: flash attention needs
    FLASH_CAPABILITY, two bytes a number and heads up to FLASH_DIM; the other one computes bfloat16 from there
    on only; both read HEAD_BYTES at a time.
    """
    import torch

    if capability is None or head_dim * dtype.itemsize % HEAD_BYTES:
        return None
    recent = capability >= FLASH_CAPABILITY
    if recent and dtype.itemsize == 2 and head_dim <= FLASH_DIM:
        return "flash"
    return "efficient" if recent or dtype != torch.bfloat16 else None
