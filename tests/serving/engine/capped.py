"""A capped allocator: no operation of a pass may make a tensor above a number of bytes.

On a GPU the caching allocator raises the same exception; here a test says where.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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
def capped(engine: BatchingEngine | SimpleEngine, most_bytes: int, method: str) -> Iterator[CappedAllocator]:
    """Cap what `method` of `engine`, which runs on its thread, may allocate."""
    allocator, original = CappedAllocator(most_bytes), getattr(engine, method)

    def run(*args: Any) -> Any:
        with allocator:
            return original(*args)

    setattr(engine, method, run)
    engine._queue.call(lambda: None)  # the step that waits now is the last without the cap
    try:
        yield allocator
    finally:
        setattr(engine, method, original)
        if engine._queue.is_open:
            engine._queue.call(lambda: None)
