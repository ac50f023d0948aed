"""How busy this machine's GPUs are, or its processors where it has none.

Asks the driver (nvml.py) and /proc, like hardware.py, which says what is there. A figure that the driver
refuses is left out, which the log says once. Does not know HTTP: both metrics endpoints answer with these
figures. Start at `gpus` and `kaito_metrics`.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime import logs, nvml
from runtime.nvml import Device, NoDriverError, NvmlError

T = TypeVar("T")

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """How busy one GPU or MIG device is, whichever process uses it; None where its driver does not say."""

    number: str
    """In the order of the PCI bus; "0:1" is the second MIG device of the first GPU."""
    name: str | None
    busy: float | None
    """Part of the last second in which a kernel ran, 0 to 1."""
    celsius: int | None
    used_bytes: int | None
    total_bytes: int | None


def gpus() -> tuple[GpuUsage, ...]:
    """Return the GPUs of this machine, or their MIG devices; none without a driver."""
    try:
        with nvml.opened():
            devices = [each for number in range(nvml.count()) for each in _told(_devices, number) or ()]
            return tuple(_usage(each) for each in devices)
    except NoDriverError:
        return ()
    except NvmlError as error:
        _say(error)
        return ()


def _devices(number: int) -> tuple[Device, ...]:
    gpu = nvml.device(number)
    return gpu.mig_devices() or (gpu,)


def _usage(gpu: Device) -> GpuUsage:
    return GpuUsage(
        number=gpu.number,
        name=_told(gpu.name),
        busy=_told(gpu.busy),
        celsius=_told(gpu.celsius),
        used_bytes=_told(gpu.used_bytes),
        total_bytes=_told(gpu.memory_bytes),
    )


def _told(question: Callable[..., T], *arguments: Any) -> T | None:
    """Return the driver's answer; None, and a line in the log the first time, where it refuses."""
    try:
        return question(*arguments)
    except NvmlError as error:
        _say(error)
        return None


def _say(error: NvmlError) -> None:
    logs.once(log, logging.WARNING, f"left out of the metrics: {error}")


def kaito_metrics() -> dict[str, Any]:
    """Return the JSON object of KAITO's own metrics server, except that its memory figures are right here."""
    visible = gpus()
    if not visible:
        return {"gpu_info": None, "cpu_info": _cpu_json()}
    return {"gpu_info": [_gpu_json(gpu) for gpu in visible], "cpu_info": None}


def _gpu_json(gpu: GpuUsage) -> dict[str, Any]:
    figures = {
        "id": gpu.number,
        "name": gpu.name,
        "load": None if gpu.busy is None else f"{gpu.busy:.2%}",
        "temperature": None if gpu.celsius is None else f"{gpu.celsius} C",
        "memory": _memory(gpu.used_bytes, gpu.total_bytes) or None,
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _cpu_json() -> dict[str, Any]:
    cores = os.cpu_count() or 1
    memory = {
        line.partition(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    }
    used = memory["MemTotal"] - memory.get("MemAvailable", memory["MemFree"])
    return {
        "load_percentage": round(min(100.0, 100 * os.getloadavg()[0] / cores), 1),
        "physical_cores": _physical_cores() or cores,
        "total_cores": cores,
        "memory": _memory(used, memory["MemTotal"]),
    }


def _physical_cores() -> int:
    lists = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/core_cpus_list")
    return len({path.read_text(encoding="utf-8") for path in lists})


def _memory(used: int | None, total: int | None) -> dict[str, str]:
    sizes = {"used": used, "total": total}
    return {name: f"{size / GIB:.2f} GB" for name, size in sizes.items() if size is not None}
