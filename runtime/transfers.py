"""Copies between the host and a device that the other does not wait for. Does not know what they hold."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: "torch.Tensor", device: "str | torch.device") -> "torch.Tensor":
    """Return `tensor` of the host on `device`, whose earlier work the copy does not wait for.

    From page-locked memory, where `device` is a GPU: others are copied once more on the host, which waits.
    """
    return _locked(tensor, device).to(device, non_blocking=True)


def fill(target: "torch.Tensor", source: "torch.Tensor") -> None:
    """Copy `source` of the host into `target` of a device, as `to_device` does."""
    target.copy_(_locked(source, target.device), non_blocking=True)


def _locked(tensor: "torch.Tensor", device: "str | torch.device") -> "torch.Tensor":
    return tensor.pin_memory() if str(device).startswith("cuda") else tensor


class HostCopy:
    """A copy of a tensor to the host, under way since it was made: only `read` waits for it."""

    def __init__(self, tensor: "torch.Tensor") -> None:
        import torch

        self._tensor, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            # what the device does after it is not waited for
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def read(self) -> "torch.Tensor":
        """Return what the tensor held when the copy began; waits until the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()
