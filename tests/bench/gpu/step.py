"""What the process of one step has: its device, its time, and the file that its figures go to.

A step is a module with `run(context)`. It measures in cases: one that fails leaves its traceback and the next
one runs; one that there is no time left for is named. Start at `Context.case`.
"""

import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.hardware import Hardware, compute_dtype

TRACEBACK_LINES = 15

Figures = dict[str, Any]
"""Figures of one case, the unit in each name; `fault` says what is wrong with them, if anything."""


class NotHereError(Exception):
    """What a case needs is not on this machine: no figure, and no failure."""


@dataclass(slots=True)
class Context:
    """One step in its process."""

    number: int
    device: str
    """cuda or cpu"""
    shape: str
    """phi-3-mini or tiny"""
    scratch: Path
    """A folder that all steps of a run share."""
    results: Path
    until: float = float("inf")
    """time.monotonic() by when the step should have ended."""
    failed: bool = False
    _copy: float | None = None

    @property
    def is_tiny(self) -> bool:
        return self.shape == "tiny"

    @property
    def dtype(self) -> torch.dtype:
        """The compute type that the runtime chooses for this device."""
        return getattr(torch, compute_dtype(self.machine))  # type: ignore[no-any-return]

    @property
    def machine(self) -> Hardware:
        """The device as torch sees it: what NVML says is step 1's subject, and no other step's trouble."""
        if self.device == "cpu":
            return Hardware("cpu", "CPU", None, 8 << 30, 1)
        found = torch.cuda.get_device_properties(0)
        return Hardware("cuda", found.name, (found.major, found.minor), found.total_memory, 1)

    def left_s(self) -> float:
        """Return the seconds left to this step."""
        return self.until - time.monotonic()

    def case(self, name: str, work: Callable[[], Figures], *, needs_s: float = 1.0) -> Figures:
        """Run `work` and write its figures; {} where it failed, or needs more than the time that is left."""
        if self.left_s() < needs_s:
            self.emit(name, left_out=f"{max(self.left_s(), 0):.0f} s left, {needs_s:.0f} needed")
            return {}
        began = time.monotonic()
        figures: Figures | None
        try:
            figures = work()
        except NotHereError as reason:
            self.emit(name, not_here=str(reason))
            figures = None
        except Exception as error:  # the other cases still tell something
            lines = traceback.format_exc().rstrip().splitlines()
            print(f"--- {name}", *lines, sep="\n", flush=True)
            said = " ".join(str(error).split())[:300]
            self.emit(name, error=f"{type(error).__name__}: {said}", traceback=lines[-TRACEBACK_LINES:])
            figures = {}
        if not figures:
            self.failed |= figures is not None
            with contextlib.suppress(Exception):  # a device that is broken fails here too
                self.release()  # what the frames of the traceback held is free by now
            return {}
        self.failed |= "fault" in figures
        self.emit(name, **figures, took_s=time.monotonic() - began)
        return figures

    def emit(self, case: str, **figures: Any) -> None:
        """Append one line of figures to the results."""
        line = json.dumps({"step": self.number, "case": case, **_rounded(figures)})
        with self.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory that nothing holds any more back to the device, and forget its peak."""
        import gc

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def milliseconds(self, work: Callable[[], object], *, repeats: int = 5, warm: int = 1) -> float:
        """Return the median time of `work` from start to idle device, after `warm` runs that do not count."""
        repeats = min(repeats, 2) if self.is_tiny else repeats
        times = []
        for number in range(warm + repeats):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            if number >= warm:
                times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times)

    def copy_gb_per_s(self) -> float:
        """Return the bandwidth of a copy on the device, bytes read and bytes written; measured once."""
        if self._copy is None:
            size = 1 << 31 if self.device == "cuda" else 1 << 24
            source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            taken = self.milliseconds(lambda: target.copy_(source), repeats=7, warm=2)
            self._copy = 2 * size / taken / 1e6
        return self._copy

    def matmul_tflop_per_s(self, dtype: torch.dtype) -> float:
        """Return the rate of a large product of random matrices."""
        size = 8192 if self.device == "cuda" else 512
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        taken = self.milliseconds(lambda: torch.mm(left, right, out=out), repeats=7, warm=2)
        return 2 * size**3 / taken / 1e9


@contextlib.contextmanager
def cudnn_attention() -> Iterator[None]:
    """Within: torch may take cuDNN's attention, as in a process that has not disabled it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of `values` lie; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _rounded(value: Any) -> Any:
    """Return `value` with floats of four digits, which is what such figures are good for."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
