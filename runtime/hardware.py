"""What this machine is: its accelerator, the compute type that suits it, its cores and its memory.

Asks the driver (nvml.py), /proc and /sys, so that a plan or a launch needs no torch. How busy the machine is
lies in utilisation.py, whether torch can use it in torch_build.py. Does not know models. Start at `detect`
and `compute_dtype`.
"""

import ctypes
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime import cuda_devices, logs, nvml
from runtime.cuda_devices import USE_THE_CPU, Visible
from runtime.errors import ConfigError
from runtime.model_source import Dtype
from runtime.nvml import Device, NoDriverError, NvmlError

log = logging.getLogger(__name__)

CACHED_KERNELS = 256
"""Compiled kernels that oneDNN keeps while serving."""


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver of a machine."""

    version: str
    """The driver's own, "580.65.06"."""
    cuda: tuple[int, int]
    """The newest CUDA version that it runs, (13, 0)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices this process may use; of several kinds, the least of each figure."""

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability, (7, 0) for a V100; None on a CPU."""
    memory_bytes: int
    """Memory of one device: of the GPU, or what the container may use of the host's."""
    count: int
    """Visible GPUs; 1 on a CPU, and with MIG, of which a CUDA process uses one device."""
    driver: Driver | None = None
    """None on a CPU, and for GPUs known by name alone."""


def detect() -> Hardware:
    """Return the GPUs that CUDA shows this process, or the CPU when there is no driver or no device.

    CUDA_VISIBLE_DEVICES means what it means to CUDA, and empty it asks for the CPU. Raises ConfigError when
    the driver refuses a question: a job for a GPU would otherwise run on the CPU for days.
    """
    setting = os.environ.get(cuda_devices.VARIABLE)
    if cuda_devices.none_requested(setting):
        return host()
    try:
        with nvml.opened():
            shown = cuda_devices.visible(setting, order=os.environ.get("CUDA_DEVICE_ORDER"))
            return _gpus(shown) if shown.devices else host()
    except NoDriverError as error:
        if error.library_is_missing and has_gpu():
            raise ConfigError(
                "there is a GPU (/dev/nvidia*, libcuda.so.1), but no libnvidia-ml.so.1 of its driver to ask; "
                f"set NVIDIA_DRIVER_CAPABILITIES=compute,utility for the container; {USE_THE_CPU}"
            ) from None
        return host()
    except NvmlError as error:
        raise ConfigError(f"{error}; {USE_THE_CPU}") from None


def host() -> Hardware:
    """Return the CPU, with the memory that this process may use of the host's."""
    return Hardware("cpu", _cpu_name(), None, _host_memory_bytes(), 1)


def _gpus(shown: Visible) -> Hardware:
    """Return the GPUs that CUDA shows, with the least memory and capability of their kinds."""
    memory = {each: _memory_bytes(each) for each in shown.kinds}
    smallest = min(shown.kinds, key=memory.__getitem__)
    kinds = sorted({f"{each.name()} ({memory[each] / 2**30:.0f} GiB)" for each in shown.kinds})
    if len(kinds) > 1:
        unordered = shown.kinds != shown.devices
        why = "an index may mean any of" if unordered else "there are GPUs of several kinds:"
        advice = (
            "CUDA_DEVICE_ORDER=PCI_BUS_ID or UUIDs say which"
            if unordered
            else f"{cuda_devices.VARIABLE} chooses"
        )
        said = f"{why} {', '.join(kinds)}; planning for the smallest, {smallest.name()}; {advice}"
        logs.once(log, logging.WARNING, said)
    return Hardware(
        kind="cuda",
        name=smallest.name(),
        capability=min(each.capability() for each in shown.kinds),
        memory_bytes=memory[smallest],
        count=len(shown.devices),
        driver=Driver(nvml.driver_version(), nvml.cuda_version()),
    )


def _memory_bytes(gpu: Device) -> int:
    own = gpu.memory_bytes()
    return _host_memory_bytes() if own is None else own


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether CUDA may find a GPU: its device file and its library are here."""
    if not any(devices.glob("nvidia[0-9]*")) and not (devices / "dxg").exists():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


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


def has_tensor_float32(hardware: Hardware) -> bool:
    """Whether `hardware` is a GPU that rounds float32 products to TensorFloat-32 where asked to."""
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


def environment_of(hardware: Hardware, local_rank: int) -> dict[str, str]:
    """Return the variables with which a process finds the GPU of `local_rank` only; none on a CPU."""
    if hardware.kind == "cpu":
        return {}
    return {cuda_devices.VARIABLE: cuda_devices.single(os.environ.get(cuda_devices.VARIABLE), local_rank)}


def check_processes(hardware: Hardware, processes: int | None) -> None:
    """Raise ConfigError when there are fewer GPUs than processes, which have one each."""
    if processes is not None and hardware.kind == "cuda" and processes > hardware.count:
        raise ConfigError(
            f"{processes} processes, but only {hardware.count} GPU(s) are visible ({hardware.name}); "
            f"start at most {hardware.count} on this node"
        )


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
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """Return a size of this process by its name in /proc/self/status, such as VmRSS; 0 without it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
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
