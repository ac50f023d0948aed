"""How busy the GPUs are, or the host where there is none; also in the words of KAITO's metrics server.

Asks the driver, not torch, so that any process may. Does not know jobs. Start at `gpus` and `peers_json`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver sees it, whoever uses it."""

    number: int
    name: str
    busy: float
    """Part of the last second in which a kernel ran, 0 to 1."""
    celsius: int
    used_bytes: int
    total_bytes: int


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(number) for number in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(number: int) -> Gpu:
    device = pynvml.nvmlDeviceGetHandleByIndex(number)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return Gpu(
        number=number,
        name=str(pynvml.nvmlDeviceGetName(device)),
        busy=pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
        celsius=pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
    )


def peers_json() -> dict[str, Any]:
    """Return the object that KAITO's own metrics server answers, with the memory it gets wrong right."""
    found = gpus()
    if not found:
        return {"gpu_info": None, "cpu_info": _cpu()}
    shown = [
        {
            "id": str(gpu.number),
            "name": gpu.name,
            "load": f"{gpu.busy:.2%}",
            "temperature": f"{gpu.celsius} C",
            "memory": _memory(gpu.used_bytes, gpu.total_bytes),
        }
        for gpu in found
    ]
    return {"gpu_info": shown, "cpu_info": None}


def _cpu() -> dict[str, Any]:
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
    found = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/core_cpus_list")
    return len({path.read_text(encoding="utf-8") for path in found})


def _memory(used: int, total: int) -> dict[str, str]:
    return {"used": f"{used / GIB:.2f} GB", "total": f"{total / GIB:.2f} GB"}
