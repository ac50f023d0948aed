"""How a device records a step: as a CUDA graph, one launch for all its kernels.

Does not know models or rows. Start at `Recorder`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """How this device records."""

    def rehearse(self, step: Callable[[], Tensor]) -> Tensor:
        """Run `step` where it will be recorded, and return its result."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """Return what repeats the operations of `step` on the same memory."""

    def forget(self) -> None:
        """Nothing that was recorded is replayed again."""


class CudaGraphs:
    """Records on an NVIDIA GPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, step: Callable[[], Tensor]) -> Tensor:
        """See `Recorder.rehearse`: what libraries set up once per stream is set up here."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            out = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return out

    def record(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """See `Recorder.record`; RuntimeError where `step` does what a graph cannot hold."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads of this process may allocate meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                step()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        return graph.replay

    def forget(self) -> None:
        """See `Recorder.forget`: the memory pool goes with its last graph."""
        self._pool = torch.cuda.graph_pool_handle()
