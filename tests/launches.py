"""Counts what a GPU's host would launch, on machines without one: torch's "meta" device stands in for it.

An operation that computes or copies is one launch, as it is one kernel in eager torch, mostly; views and
allocations are none. Start at `Launches`.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh",
    "_unsafe_view",
}  # fmt: skip
"""Operations that only allocate or name memory."""
SEVERAL = {"slice_backward": 2}
"""Kernels of an operation that is more than one: zeros, and a copy into a part of them."""


class Launches(TorchDispatchMode):
    """Within: launches by operation are counted in `found`, and autocast to `dtype` is on for the device."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.inside = False
        known, typed = torch.is_autocast_enabled, torch.get_autocast_dtype
        self._patches = (
            mock.patch.object(
                torch, "is_autocast_enabled", lambda kind="cuda": kind == "meta" or known(kind)
            ),
            mock.patch.object(
                torch, "get_autocast_dtype", lambda kind: dtype if kind == "meta" else typed(kind)
            ),
        )
        self._fused = FusedNorms(self)

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def __enter__(self) -> "Launches":
        for patch in self._patches:
            patch.start()
        self._fused.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fused.__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        remote = any(each.device.type == "meta" for each in tensors) or "device" in kwargs
        if remote and not (self.inside or func.is_view or name in NO_KERNEL):
            self.found[name] += SEVERAL.get(name, 1)
        if name == "_efficient_attention_backward":  # torch's meta function takes other arguments
            return (*(torch.empty_like(each) for each in args[1:4]), None)
        return func(*args, **kwargs)


class FusedNorms(TorchFunctionMode):
    """Counts torch's fused norm as the one kernel that it is on a GPU; elsewhere it is made of others."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:  # whose operations are to be seen too
            with self:
                return torch.autograd.backward(args[0])
        if func is torch.ops.aten._fused_rms_norm:
            return self._as_one("_fused_rms_norm", lambda: func(*args, **kwargs))
        if func is torch.ops.aten._fused_rms_norm_backward:
            return self._as_one("_fused_rms_norm_backward", lambda: (torch.empty_like(args[1]), None))
        return func(*args, **kwargs)

    def _as_one(self, name: str, work: Callable[[], Any]) -> Any:
        self.launches.found[name] += 1
        self.launches.inside = True
        try:
            return work()
        finally:
            self.launches.inside = False
