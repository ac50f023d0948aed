"""What torch's profiler sees of a piece of work: launches, how busy the GPU was, and when the host waited.

Start at `trace`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu.step import Context

MOST_KERNELS = 8


@dataclass(frozen=True, slots=True)
class Trace:
    """One profiled piece of work."""

    launches: int
    """Kernels that the host launched, and graphs as one each; on a CPU, operations of torch."""
    busy_share: float
    """Of the time from the first kernel's start to the last one's end, in which one ran; NaN on a CPU."""
    waits: dict[str, int]
    """How often the host waited for the device, by CUDA's call."""
    reads: int
    """Copies from the device to the host."""
    asked: dict[str, int]
    """How often the host asked a tensor for a number, by torch's call; many such tensors are on the host."""
    kernels: dict[str, float]
    """Milliseconds by kernel, those that took longest."""


def trace(context: Context, work: Callable[[], object]) -> Trace:
    """Run `work` under the profiler."""
    gpu = context.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    context.synchronize()
    with profile(activities=activities) as profiled:
        work()
        context.synchronize()
    return read(profiled, gpu=gpu)


def read(profiled: profile, *, gpu: bool) -> Trace:
    """Return what `profiled` recorded."""
    calls: list[tuple[float, str]] = []
    kernels: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    reads = 0
    for event in profiled.events() or ():
        on_device = "CUDA" in str(event.device_type)
        if getattr(event, "is_user_annotation", False):  # ranges that a library marks, on the device too
            continue
        if on_device:
            spans.append((event.time_range.start, event.time_range.end))
            reads += event.name.startswith("Memcpy DtoH")
            kernels[event.name] += event.time_range.elapsed_us() / 1000
        else:
            calls.append((event.time_range.start, event.name))
    names = [name for _, name in sorted(calls)]
    return Trace(
        launches=sum(name.startswith(_LAUNCHES if gpu else "aten::") for name in names),
        busy_share=busy(spans),
        waits=_waits(names),
        reads=reads,
        asked=_counted(names, _ASKS),
        kernels=dict(kernels.most_common(MOST_KERNELS)),
    )


def _waits(names: Sequence[str]) -> dict[str, int]:
    """Count the waits among calls in their order, without those for the whole device that end every trace."""
    work = [name for name in names if name.startswith((*_LAUNCHES, "cudaMem", *_WAITS))]
    while work and work[-1] == "cudaDeviceSynchronize":
        work.pop()
    return _counted(work, _WAITS)


def _counted(names: Sequence[str], which: Sequence[str]) -> dict[str, int]:
    return {name: count for name, count in Counter(names).items() if name in which}


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_ASKS = ("aten::item", "aten::nonzero", "aten::is_nonzero")


def busy(spans: list[tuple[float, float]]) -> float:
    """Return the part of the time from first to last in which any of `spans` lies."""
    if not spans:
        return float("nan")
    spans = sorted(spans)
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / max(reached - spans[0][0], 1e-9)
