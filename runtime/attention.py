"""Which kernel torch's attention (SDPA) takes: what it would choose badly by itself.

Imports torch where it is used. Does not know models, batches or caches. Start at `disable_cudnn` and
`match_heads`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
