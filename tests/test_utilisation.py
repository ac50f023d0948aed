"""How busy the machine is, in the JSON that KAITO's own metrics server answers."""

import pytest

from runtime import utilisation
from runtime.tuning.report import metrics_server
from runtime.tuning.train.progress import JobState
from runtime.utilisation import GpuUsage
from tests.nvml_standin import (
    A100,
    GPU_IS_LOST,
    IN_A_CONTAINER,
    NO_PERMISSION,
    SLICED,
    SLICES,
    T4,
    UNKNOWN,
    VERSION_MISMATCH,
    Gpu,
    Machine,
    NvmlProcess,
)

GIB = 2**30


def scraped() -> str:
    return metrics_server.metrics_text(lambda: JobState("job", "model", "train")).decode()


def test_gpus_are_reported_by_number_with_memory_in_gigabytes(nvml_process: NvmlProcess) -> None:
    machine = Machine((T4,))
    assert nvml_process.ask(machine, utilisation.gpus) == (
        GpuUsage("0", "Tesla T4", 0.25, 40, int(3.75 * GIB), 15 * GIB),
    )
    assert nvml_process.ask(machine, utilisation.kaito_metrics) == {
        "gpu_info": [
            {
                "id": "0",
                "name": "Tesla T4",
                "load": "25.00%",
                "temperature": "40 C",
                "memory": {"used": "3.75 GB", "total": "15.00 GB"},
            }
        ],
        "cpu_info": None,
    }
    assert 'tuning_gpu_busy_ratio{gpu="0"} 0.25' in nvml_process.ask(machine, scraped)


def test_a_mig_device_is_reported_in_place_of_its_gpu(nvml_process: NvmlProcess) -> None:
    machine = Machine((T4, SLICED), IN_A_CONTAINER)
    whole, first, second = nvml_process.ask(machine, utilisation.gpus)
    assert whole.number == "0"
    assert first == GpuUsage("1:0", SLICES[0].name, None, 40, (9856 << 20) // 4, 9856 << 20)
    assert (second.number, second.total_bytes) == ("1:1", 40192 << 20)


def test_a_refused_figure_is_left_out_and_said_once(nvml_process: NvmlProcess) -> None:
    machine = Machine(
        (T4,), {"nvmlDeviceGetUtilizationRates": NO_PERMISSION, "nvmlDeviceGetMemoryInfo": UNKNOWN}
    )
    figures, lines = nvml_process.ask_with_log(machine, utilisation.kaito_metrics)
    assert figures["gpu_info"] == [{"id": "0", "name": "Tesla T4", "temperature": "40 C"}]
    assert len(lines) == 2
    assert lines[0].startswith(
        "left out of the metrics: the NVIDIA driver refused nvmlDeviceGetUtilizationRates"
    )
    text = nvml_process.ask(machine, scraped)
    assert "tuning_gpu_busy_ratio{" not in text
    assert "tuning_gpu_memory_bytes{" not in text
    assert "tuning_job_info" in text


def test_a_lost_gpu_hides_no_other(nvml_process: NvmlProcess) -> None:
    two = (A100, Gpu("NVIDIA L4", (8, 9), 23034, uuid="GPU-2"))
    machine = Machine(two, {"nvmlDeviceGetHandleByIndex_v2": (GPU_IS_LOST, A100.uuid)})
    assert [gpu.number for gpu in nvml_process.ask(machine, utilisation.gpus)] == ["1"]


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("nvmlInitWithFlags", VERSION_MISMATCH),
        ("nvmlInitWithFlags", UNKNOWN),
        ("nvmlDeviceGetCount_v2", UNKNOWN),
        ("nvmlShutdown", UNKNOWN),
        ("nvmlDeviceGetMaxMigDeviceCount", UNKNOWN),
    ],
)
def test_metrics_survive_a_driver_that_refuses(call: str, code: int, nvml_process: NvmlProcess) -> None:
    machine = Machine((T4,), {call: code})
    assert set(nvml_process.ask(machine, utilisation.kaito_metrics)) == {"gpu_info", "cpu_info"}
    assert "tuning_job_info" in nvml_process.ask(machine, scraped)


def test_without_a_driver_the_processors_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "gpus", tuple)
    figures = utilisation.kaito_metrics()
    assert figures["gpu_info"] is None
    assert set(figures["cpu_info"]) == {"load_percentage", "physical_cores", "total_cores", "memory"}
    assert 1 <= figures["cpu_info"]["physical_cores"] <= figures["cpu_info"]["total_cores"]
