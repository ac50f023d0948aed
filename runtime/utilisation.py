"""How busy this machine's GPUs are, or its processors where it has none.

Reads NVML and /proc, like hardware.py, which says what is there. Does not know HTTP: both metrics endpoints
answer with these figures. Start at `gpus` and `kaito_metrics`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """How busy one GPU is, whichever process uses it, as its driver reports."""

    number: int
    name: str
    busy: float
    """Part of the last second in which a kernel ran, 0 to 1."""
    celsius: int
    used_bytes: int
    total_bytes: int


def gpus() -> tuple[GpuUsage, ...]:
    """Return the GPUs of this machine; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(number) for number in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(number: int) -> GpuUsage:
    device = pynvml.nvmlDeviceGetHandleByIndex(number)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return GpuUsage(
        number=number,
        name=str(pynvml.nvmlDeviceGetName(device)),
        busy=pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
        celsius=pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
    )


def kaito_metrics() -> dict[str, Any]:
    """Return the JSON object of KAITO's own metrics server, except that its memory figures are right here."""
    visible = gpus()
    if not visible:
        return {"gpu_info": None, "cpu_info": _cpu_json()}
    figures = [
        {
            "id": str(gpu.number),
            "name": gpu.name,
            "load": f"{gpu.busy:.2%}",
            "temperature": f"{gpu.celsius} C",
            "memory": _memory(gpu.used_bytes, gpu.total_bytes),
        }
        for gpu in visible
    ]
    return {"gpu_info": figures, "cpu_info": None}


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


def _memory(used: int, total: int) -> dict[str, str]:
    return {"used": f"{used / GIB:.2f} GB", "total": f"{total / GIB:.2f} GB"}
