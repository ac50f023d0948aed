"""What torch's profiler sees of a piece of work: launches, how busy the GPU was, and when the host waited.

Start at `trace`.
"""

from collections import Counter
from collections.abc import Callable
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
    """How often the host waited for the device or asked for a number of it, by call."""
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
    calls: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    for event in profiled.events() or ():
        on_device = "CUDA" in str(event.device_type)
        if getattr(event, "is_user_annotation", False):  # ranges that a library marks, on the device too
            continue
        if on_device:
            spans.append((event.time_range.start, event.time_range.end))
            kernels[event.name] += event.time_range.elapsed_us() / 1000
        else:
            calls[event.name] += 1
    # the synchronisation that ends every trace is not the work's
    waits = {name: count for name in _WAITS if (count := calls[name] - (name == "cudaDeviceSynchronize")) > 0}
    launches = sum(count for name, count in calls.items() if name.startswith(_LAUNCHES))
    if not gpu:
        launches = sum(count for name, count in calls.items() if name.startswith("aten::"))
    return Trace(launches, busy(spans), waits, dict(kernels.most_common(MOST_KERNELS)))


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item",
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero",
)  # fmt: skip


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
