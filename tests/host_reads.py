"""Finds what makes the host wait for a GPU, on machines without one: torch's "meta" device stands in for it.

Like a GPU's, a meta tensor's values are not the host's, and code that asks for its device takes the GPU's
path. Start at `HostReads`.
"""

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZED_BY_VALUES = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal",
}  # fmt: skip
"""Operations whose result, or its size, the host needs."""


class HostReads(TorchDispatchMode):
    """Within: reads of the device and copies that wait for it are noted in `found`; a read gives ones."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        known = torch.is_autocast_enabled
        self._autocast = mock.patch.object(  # which raises for a device that has none
            torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and known(kind)
        )

    def __enter__(self) -> "HostReads":
        self._autocast.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._autocast.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, overload = func.overloadpacket.__name__, func._overloadname
        first = args[0] if args else None
        if name == "_local_scalar_dense" and _remote(first):
            self.found.append(f"a value of {tuple(first.shape)}")
            return True if first.dtype == torch.bool else first.new_ones((), device="cpu").tolist()
        if name == "_to_copy" and (device := kwargs.get("device")) is not None:
            return self._copy(func, first, torch.device(device), kwargs)
        if name == "copy_" and _remote(args[0]) != _remote(args[1]):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if _remote(args[1]):
                self.found.append(f"copy_ of {tuple(args[1].shape)} to the host")
                return args[0].fill_(1)
            if not non_blocking:
                self.found.append(f"copy_ of {tuple(args[1].shape)} that waits for the device")
        if name.startswith("lift_fresh") and _remote(first):
            self.found.append(f"torch.tensor of {tuple(first.shape)} on the device")
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and _remote(each) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        repeats = name == "repeat_interleave" and overload == "Tensor"
        if name == "_efficient_attention_backward" and _remote(first):  # torch's takes other arguments
            return (*(torch.empty_like(each) for each in args[1:4]), None)
        if masks or repeats or (name in SIZED_BY_VALUES and _remote(first)):
            self.found.append(f"{name} of {tuple(first.shape)}")
        return func(*args, **kwargs)

    def _copy(self, func: Any, source: Any, device: torch.device, kwargs: dict[str, Any]) -> Any:
        if _remote(source) and device.type == "cpu":
            self.found.append(f"{tuple(source.shape)} to the host")
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not _remote(source) and device.type == "meta" and not kwargs.get("non_blocking"):
            self.found.append(f"a copy of {tuple(source.shape)} that waits for the device")
        return func(source, **kwargs)


def _remote(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"
