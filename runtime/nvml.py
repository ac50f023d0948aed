"""What the NVIDIA driver says about its GPUs and their MIG devices, through its management library (NVML).

The only importer of pynvml. A call that is refused raises `NvmlError`, which names the call, the device and
the library's own words; whether that ends the process is for the caller: hardware.py ends it, utilisation.py
leaves a figure out. Does not know which GPUs CUDA shows (cuda_devices.py). Start at `opened` and `Device`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pynvml

_ABSENT = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
"""Answers that mean "this GPU, or this driver, has no such thing"."""

_ANOTHER_CONTAINERS = frozenset({pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION})
"""Answers for the number of a MIG device that does not exist, or that this container was not given."""

_ADVICE = {
    pynvml.NVML_ERROR_NO_PERMISSION: "request the GPU in the pod or container (nvidia.com/gpu, --gpus), and "
    "let this user read /dev/nvidia*",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated and its old kernel module is still "
    "loaded: restart the node",
    pynvml.NVML_ERROR_GPU_IS_LOST: "reset the GPU or restart the node",
    pynvml.NVML_ERROR_RESET_REQUIRED: "reset the GPU or restart the node",
    pynvml.NVML_ERROR_UNKNOWN: "restart the container: one loses its GPUs when systemd reloads on the node",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "this driver is too old: update it",
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "libcuda.so.1 is missing: set NVIDIA_DRIVER_CAPABILITIES="
    "compute,utility for the container",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU does not report it",
}
"""What to do about a refusal, by its code."""


class NvmlError(Exception):
    """NVML refused a call; the text says which, for which device, why, and what to do."""

    def __init__(self, call: str, number: str, error: pynvml.NVMLError) -> None:
        self.code = int(error.value)
        about = f" for GPU {number}" if number else ""
        advice = _ADVICE.get(self.code, "see what nvidia-smi says on the node")
        super().__init__(f"the NVIDIA driver refused {call}{about}: {str(error).rstrip('.')}; {advice}")


class NoDriverError(NvmlError):
    """There is no driver: its library is not installed, or its kernel module not loaded."""

    @property
    def library_is_missing(self) -> bool:
        """Whether libnvidia-ml.so.1 itself was not found."""
        return self.code == int(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """Within: the functions below can be called. Raises NoDriverError without a driver, else NvmlError."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
        raise NoDriverError("nvmlInit", "", error) from None
    except pynvml.NVMLError as error:
        raise NvmlError("nvmlInit", "", error) from None
    try:
        yield
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a MIG device, which is a slice of one."""

    number: str
    """"1" for a GPU, in the order of the PCI bus as in nvidia-smi; "1:0" for its first MIG device."""
    handle: Any = field(compare=False, repr=False)
    parent: "Device | None" = None
    """The GPU of a MIG device."""

    def name(self) -> str:
        """Return the name; a MIG device's ends with its profile."""
        return str(self._ask("nvmlDeviceGetName"))

    def uuid(self) -> str:
        """Return "GPU-…" or "MIG-…"."""
        return str(self._ask("nvmlDeviceGetUUID"))

    def memory_bytes(self) -> int | None:
        """Return the memory of the GPU or slice; None where it is the host's (GB10, Jetson)."""
        try:
            return int(self._ask("nvmlDeviceGetMemoryInfo").total)
        except NvmlError as error:
            if error.code == pynvml.NVML_ERROR_NOT_SUPPORTED:
                return None
            raise

    def used_bytes(self) -> int:
        """Return the memory in use, by whichever process."""
        return int(self._ask("nvmlDeviceGetMemoryInfo").used)

    def capability(self) -> tuple[int, int]:
        """Return the CUDA compute capability; a MIG device has that of its GPU."""
        try:
            major, minor = (self.parent or self)._ask("nvmlDeviceGetCudaComputeCapability")
        except NvmlError:
            if self.parent is None:
                raise
            major, minor = self._ask("nvmlDeviceGetCudaComputeCapability")
        return int(major), int(minor)

    def busy(self) -> float:
        """Return the part of the last second in which a kernel ran, 0 to 1; MIG devices refuse it."""
        return float(self._ask("nvmlDeviceGetUtilizationRates").gpu) / 100

    def celsius(self) -> int:
        """Return the temperature; of a MIG device, that of its GPU."""
        return int((self.parent or self)._ask("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU))

    def in_mig_mode(self) -> bool:
        """Return whether CUDA sees this GPU's MIG devices, and not the GPU."""
        return self._most_mig_devices() > 0

    def mig_devices(self) -> "tuple[Device, ...]":
        """Return the MIG devices of a GPU that this process may use."""
        found = []
        for number in range(self._most_mig_devices()):
            try:
                handle = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", number)
            except NvmlError as error:
                if error.code in _ANOTHER_CONTAINERS:
                    continue
                raise
            found.append(Device(f"{self.number}:{number}", handle, self))
        return tuple(found)

    def instances(self) -> tuple[int, int]:
        """Return the numbers of a MIG device's GPU instance and compute instance."""
        gpu, compute = "nvmlDeviceGetGpuInstanceId", "nvmlDeviceGetComputeInstanceId"
        return int(self._ask(gpu)), int(self._ask(compute))

    def _most_mig_devices(self) -> int:
        try:
            return int(self._ask("nvmlDeviceGetMaxMigDeviceCount"))
        except NvmlError as error:
            if error.code in _ABSENT:
                return 0
            raise

    def _ask(self, call: str, *arguments: Any) -> Any:
        return _call(call, self.handle, *arguments, number=self.number)


def count() -> int:
    """Return how many GPUs the driver knows, those that it then refuses included."""
    return int(_call("nvmlDeviceGetCount"))


def device(number: int) -> Device:
    """Return a GPU by its number in the order of the PCI bus."""
    return Device(str(number), _call("nvmlDeviceGetHandleByIndex", number, number=str(number)))


def driver_version() -> str:
    """Return the driver's version, for people: "580.65.06"."""
    return str(_call("nvmlSystemGetDriverVersion"))


def cuda_version() -> tuple[int, int]:
    """Return the CUDA version that the driver offers.

    That of the libcuda.so.1 which a process here would load, and so of NVIDIA's forward compatibility package
    where that comes first.
    """
    try:
        version = int(_call("nvmlSystemGetCudaDriverVersion_v2"))
    except NvmlError as error:
        if error.code not in _ABSENT:
            raise
        version = int(_call("nvmlSystemGetCudaDriverVersion"))  # a driver older than that call
    return version // 1000, version % 1000 // 10


def _call(call: str, *arguments: Any, number: str = "") -> Any:
    try:
        return getattr(pynvml, call)(*arguments)
    except pynvml.NVMLError as error:
        raise NvmlError(call, number, error) from None
