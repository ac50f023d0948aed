"""Which of torch's attention kernels a call takes: what SDPA would choose badly, and which ones take packs.

Imports torch where it is used. Does not know models, batches or caches. Start at `disable_cudnn`,
`match_heads` and `varlen_kernel`.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

VarlenKernel = Literal["flash", "efficient"]
"""torch's kernels for sequences end to end: FlashAttention 2 and the memory-efficient one."""


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


def varlen_kernel(query: "torch.Tensor") -> VarlenKernel | None:
    """Return the kernel that attends in sequences of any lengths by one call; query (…, D), on their device.

    None on a CPU, and where neither takes such heads or numbers: flash attention needs compute capability
    8.0, two bytes a number and D <= 256; the other one computes bfloat16 from 8.0 on only; both read 16 bytes
    at a time.
    """
    import torch

    if query.device.type == "cpu":
        return None
    recent, head_dim = torch.cuda.get_device_capability(query.device) >= (8, 0), query.shape[-1]
    if head_dim * query.element_size() % 16:
        return None
    if recent and query.element_size() == 2 and head_dim <= 256:
        return "flash"
    return "efficient" if recent or query.dtype != torch.bfloat16 else None
