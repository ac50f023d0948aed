"""What this machine is: its accelerator, the compute type that suits it, its cores and its memory.

Reads NVML, /proc and /sys, so that a plan or a launch needs no torch; falls back to the CPU. How busy the
machine is lies in utilisation.py. Does not know models. Start at `detect` and `compute_dtype`.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pynvml

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.model_source import Dtype

CACHED_KERNELS = 256
"""Compiled kernels that oneDNN keeps while serving."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices this process may use; all are taken to be of one kind."""

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability, (7, 0) for a V100; None on a CPU."""
    memory_bytes: int
    """Memory of one device: of the GPU, or what the container may use of the host's."""
    count: int
    """Visible GPUs; 1 on a CPU."""


_KNOWN_GPUS: dict[str, tuple[tuple[int, int], int]] = {
    "T4-16GB": ((7, 5), 15360),
    "V100-16GB": ((7, 0), 16160),
    "V100-32GB": ((7, 0), 32510),
    "A10-24GB": ((8, 6), 23028),
    "L4-24GB": ((8, 9), 23034),
    "A100-40GB": ((8, 0), 40536),
    "L40S-48GB": ((8, 9), 46068),
    "A100-80GB": ((8, 0), 81920),
    "H100-80GB": ((9, 0), 81559),
    "H100-94GB": ((9, 0), 95830),
    "H200-141GB": ((9, 0), 143771),
}
"""GPUs that a plan can be made for without having one: compute capability, and about the MiB it reports.

On a machine with the GPU, "auto" asks its driver instead.
"""


def names() -> tuple[str, ...]:
    """Return the GPUs that `named` knows, smallest first."""
    return tuple(sorted(_KNOWN_GPUS, key=lambda name: _KNOWN_GPUS[name][1]))


def named(name: str, *, count: int = 1) -> Hardware:
    """Return the hardware with `count` GPUs of a kind known by name; ConfigError for another name."""
    known = {each.lower(): each for each in _KNOWN_GPUS}
    if name.lower() not in known:
        raise ConfigError(
            f"no GPU {name!r}{nearest(name, known.values())}; known: {', '.join(names())}, or auto"
        )
    kind = known[name.lower()]
    capability, mebibytes = _KNOWN_GPUS[kind]
    return Hardware("cuda", kind, capability, mebibytes << 20, count)


def detect() -> Hardware:
    """Return the visible NVIDIA GPUs (CUDA_VISIBLE_DEVICES is honoured), or the CPU when there are none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return _cpu()
    try:
        visible = _visible(pynvml.nvmlDeviceGetCount())
        if not visible:
            return _cpu()
        by_uuid = isinstance(visible[0], str)
        device = (pynvml.nvmlDeviceGetHandleByUUID if by_uuid else pynvml.nvmlDeviceGetHandleByIndex)(
            visible[0]
        )
        return Hardware(
            kind="cuda",
            name=str(pynvml.nvmlDeviceGetName(device)),
            capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device)),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(device).total),
            count=len(visible),
        )
    except pynvml.NVMLError:  # a driver without a usable device: the container was started without --gpus
        return _cpu()
    finally:
        pynvml.nvmlShutdown()


def _visible(count: int) -> list[int] | list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(range(count))
    entries = [entry.strip() for entry in chosen.split(",") if entry.strip()]
    if all(entry.isdecimal() for entry in entries):
        return [int(entry) for entry in entries if int(entry) < count]
    return [] if entries[:1] == ["-1"] else entries


def compute_dtype(hardware: Hardware, wanted: Dtype = "auto") -> Literal["float32", "float16", "bfloat16"]:
    """Return the compute type: bfloat16 from compute capability 8.0 on, float16 below, float32 on a CPU.

    A CPU without native bfloat16 runs it about ten times slower than float32, and a V100 or T4 emulates
    it, so "auto" never picks it there. Raises ConfigError when `wanted` is bfloat16 on such a GPU.
    """
    native_bf16 = has_bfloat16(hardware)
    if wanted == "auto":
        if hardware.kind == "cpu":
            return "float32"
        return "bfloat16" if native_bf16 else "float16"
    if wanted == "bfloat16" and hardware.kind == "cuda" and not native_bf16:
        major, minor = hardware.capability or (0, 0)
        raise ConfigError(
            f"dtype is bfloat16, but {hardware.name} (compute capability {major}.{minor}) has none; "
            "use float16 or auto"
        )
    return wanted


def has_bfloat16(hardware: Hardware) -> bool:
    """Whether `hardware` is a GPU that computes in bfloat16 itself, rather than by emulation."""
    return hardware.capability is not None and hardware.capability >= (8, 0)


def device(hardware: Hardware, local_rank: int = 0) -> str:
    """Return the torch device of `local_rank`: "cuda:0", or "cpu"."""
    if hardware.kind == "cpu":
        return "cpu"
    if local_rank >= hardware.count:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but only {hardware.count} GPU(s) are visible; start at most "
            f"{hardware.count} process(es) on this node"
        )
    return f"cuda:{local_rank}"


def _cpu() -> Hardware:
    return Hardware("cpu", _cpu_name(), None, _host_memory_bytes(), 1)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "CPU"


def usable_cores(sysfs: Path = Path("/sys")) -> int:
    """Return how many physical cores this process may use, by its affinity and its container's CPU limit.

    A CPU limit hides no cores: in a pod with 4 of a node's 64, a thread on each would mostly be throttled.
    """
    mine = os.sched_getaffinity(0)
    siblings = {core: sysfs / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list" for core in mine}
    physical = len({_text(path) or str(core) for core, path in siblings.items()})
    return max(1, min(physical, int(_cpu_limit(sysfs / "fs/cgroup"))))


def _cpu_limit(cgroup: Path) -> float:
    """Return the cores' worth of time that the control group allows (its second version, or the first)."""
    quota, _, period = _text(cgroup / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(cgroup / "cpu/cpu.cfs_quota_us"), _text(cgroup / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else float(1 << 20)


def _host_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(Path(limit))
        if text.isdecimal():
            total = min(total, int(text))
    return total


def peak_resident_bytes() -> int:
    """Return the most host memory that this process held.

    Not getrusage's ru_maxrss: a process starts with the peak of the one that spawned it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def return_freed_memory() -> None:
    """Make glibc give freed blocks of 1 MiB and more back at once; without effect on another libc.

    By default it keeps blocks of up to 32 MiB for reuse, and a training step's many sizes then take well
    more memory than is in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD; setting it also ends its growing


def limit_kernel_caches() -> None:
    """Let oneDNN, and torch's layer above, keep `CACHED_KERNELS` kernels each; call before importing torch.

    Both keep 1,024 by default, one for every count of tokens and layer size met, of some 0.3 MiB: a server
    that meets prompts of all lengths grew by 500 MiB. Decoding alone meets some 160 (32 sequences, 5 sizes).
    Variables that the user has set keep their values.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(CACHED_KERNELS))


def _text(path: Path) -> str:
    """Return the text of a file of the operating system's kernel, "" where it does not exist."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
