"""Capped allocators: what is larger than a number of bytes cannot be had.

`capped` is for an engine in this process: no operation of a pass may make a larger tensor (a GPU's caching
allocator raises the same exception). `ProcessCaps` is for processes: torch's own allocator fails (capped.c).
"""

import os
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.engine import BatchingEngine


class CappedAllocator(TorchDispatchMode):
    """Raises torch.OutOfMemoryError for a new tensor of more than `most_bytes`, and remembers all others."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self.most_bytes = most_bytes
        self.refused = 0
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        for each in _tensors(out):
            storage = each.untyped_storage()
            if storage.data_ptr() in known:
                continue
            if storage.nbytes() > self.most_bytes:
                self.refused += 1
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes"
                )
            self.made.append(weakref.ref(each))
        return out

    @property
    def alive(self) -> int:
        """How many of the tensors that were made are still referred to."""
        return sum(each() is not None for each in self.made)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if not leaf.is_mkldnn]  # oneDNN's weights have no storage


@contextmanager
def capped(
    engine: BatchingEngine | SimpleEngine, most_bytes: int, method: str, *, of: Any = None
) -> Iterator[CappedAllocator]:
    """Cap what `method` of the engine, or `of` a part of it, may allocate; it runs on the engine's thread."""
    owner = engine if of is None else of
    allocator, original = CappedAllocator(most_bytes), getattr(owner, method)

    def run(*args: Any, **named: Any) -> Any:
        with allocator:
            return original(*args, **named)

    setattr(owner, method, run)
    engine._queue.call(lambda: None)  # the step that waits now is the last without the cap
    try:
        yield allocator
    finally:
        setattr(owner, method, original)
        if engine._queue.is_open:
            engine._queue.call(lambda: None)


class ProcessCaps:
    """Caps of processes that are started with `environ`, and of their own; each may be set while it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        library, source = folder / "capped.so", Path(__file__).with_suffix(".c")
        command = ["cc", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self.environ = os.environ | {
            "LD_PRELOAD": str(library), "CAPPED_BY": str(folder), "OMP_NUM_THREADS": "1"
        }  # fmt: skip

    def set(self, pid: int, most_bytes: int) -> None:
        """Let process `pid` have no block of more than `most_bytes` from now on."""
        (self._folder / str(pid)).write_text(str(most_bytes))
