"""How busy the machine is, in the JSON that KAITO's own metrics server answers."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from runtime import utilisation

GIB = 2**30


def test_gpus_are_reported_by_number_with_memory_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": "Tesla T4",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * GIB, total=15 * GIB),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=25),
        "nvmlDeviceGetTemperature": 40,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    assert utilisation.gpus() == (utilisation.GpuUsage(0, "Tesla T4", 0.25, 40, 3 * GIB, 15 * GIB),)
    assert utilisation.kaito_metrics() == {
        "gpu_info": [
            {
                "id": "0",
                "name": "Tesla T4",
                "load": "25.00%",
                "temperature": "40 C",
                "memory": {"used": "3.00 GB", "total": "15.00 GB"},
            }
        ],
        "cpu_info": None,
    }


def test_without_a_driver_the_processors_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "gpus", tuple)
    figures = utilisation.kaito_metrics()
    assert figures["gpu_info"] is None
    assert set(figures["cpu_info"]) == {"load_percentage", "physical_cores", "total_cores", "memory"}
    assert 1 <= figures["cpu_info"]["physical_cores"] <= figures["cpu_info"]["total_cores"]
