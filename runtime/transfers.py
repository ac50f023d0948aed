"""Copies of tensors to a device that the host does not wait for. Does not know what they hold."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: "torch.Tensor", device: "str | torch.device") -> "torch.Tensor":
    """Return `tensor` of the host on `device`, whose earlier work the copy does not wait for.

    From page-locked memory, where `device` is a GPU: others are copied once more on the host, which waits.
    """
    source = tensor.pin_memory() if str(device).startswith("cuda") else tensor
    return source.to(device, non_blocking=True)
