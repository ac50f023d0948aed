"""The compute type follows the GPU: bfloat16 only where it is native, never on a CPU by itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime import hardware
from runtime.errors import ConfigError
from runtime.hardware import Driver, Hardware, compute_dtype, detect, device, usable_cores
from tests.nvml_standin import A100 as A100_GPU
from tests.nvml_standin import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    IN_A_CONTAINER,
    NO_PERMISSION,
    NOT_SUPPORTED,
    SLICED,
    SLICES,
    UNKNOWN,
    VERSION_MISMATCH,
    Gpu,
    Machine,
    NvmlProcess,
)
from tests.nvml_standin import T4 as T4_GPU
from tests.nvml_standin import V100 as V100_GPU

V100 = Hardware("cuda", "Tesla V100", (7, 0), 16 << 30, 1)
T4 = Hardware("cuda", "Tesla T4", (7, 5), 16 << 30, 1)
A100 = Hardware("cuda", "A100", (8, 0), 80 << 30, 2)
CPU = Hardware("cpu", "CPU", None, 8 << 30, 1)


@pytest.mark.parametrize(
    ("hardware", "expected"), [(V100, "float16"), (T4, "float16"), (A100, "bfloat16"), (CPU, "float32")]
)
def test_auto_picks_what_the_device_runs_natively(hardware: Hardware, expected: str) -> None:
    assert compute_dtype(hardware) == expected


def test_fault_28_bfloat16_on_a_v100_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"bfloat16, but Tesla V100 \(compute capability 7\.0\).*float16"):
        compute_dtype(V100, "bfloat16")


def test_an_explicit_type_is_honoured() -> None:
    assert compute_dtype(A100, "float32") == "float32"
    assert compute_dtype(CPU, "bfloat16") == "bfloat16"


def test_more_processes_than_gpus_is_a_clear_error() -> None:
    assert device(A100, 1) == "cuda:1"
    assert device(CPU, 3) == "cpu"
    with pytest.raises(ConfigError, match="LOCAL_RANK is 2, but only 2 GPU"):
        device(A100, 2)


def test_without_a_driver_the_cpu_is_found_with_its_memory() -> None:
    found = detect()
    if found.kind == "cuda":
        pytest.skip("a GPU is here")
    assert found.memory_bytes > 1 << 30


def found(process: NvmlProcess, machine: Machine, **variables: str) -> Hardware:
    answer: Hardware = process.ask(machine, detect, **variables)
    return answer


def test_gpus_of_one_kind_are_counted(nvml_process: NvmlProcess) -> None:
    two = Machine((A100_GPU, Gpu(A100_GPU.name, (8, 0), A100_GPU.mebibytes, uuid="GPU-2")))
    expected = Hardware("cuda", A100_GPU.name, (8, 0), 80 << 30, 2, Driver("580.65.06", (13, 0)))
    assert found(nvml_process, two) == expected
    assert found(nvml_process, two, CUDA_VISIBLE_DEVICES="GPU-8932").count == 1


@pytest.mark.parametrize(
    ("machine", "variables"),
    [
        (Machine((A100_GPU,), {"nvmlInitWithFlags": DRIVER_NOT_LOADED}), {}),
        (Machine(), {}),
        (Machine((A100_GPU,)), {"CUDA_VISIBLE_DEVICES": ""}),
        (Machine((A100_GPU,), {"nvmlInitWithFlags": UNKNOWN}), {"CUDA_VISIBLE_DEVICES": "-1"}),
    ],
)
def test_the_cpu_is_for_no_driver_no_device_or_a_request(
    machine: Machine, variables: dict[str, Any], nvml_process: NvmlProcess
) -> None:
    assert found(nvml_process, machine, **variables).kind == "cpu"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("nvmlInitWithFlags", NO_PERMISSION),
        ("nvmlInitWithFlags", VERSION_MISMATCH),
        ("nvmlInitWithFlags", UNKNOWN),
        ("nvmlDeviceGetCount_v2", UNKNOWN),
        ("nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION),
        ("nvmlDeviceGetHandleByIndex_v2", GPU_IS_LOST),
        ("nvmlDeviceGetName", UNKNOWN),
        ("nvmlDeviceGetMemoryInfo", NO_PERMISSION),
        ("nvmlDeviceGetCudaComputeCapability", GPU_IS_LOST),
        ("nvmlDeviceGetMaxMigDeviceCount", UNKNOWN),
        ("nvmlSystemGetDriverVersion", UNKNOWN),
        ("nvmlSystemGetCudaDriverVersion_v2", UNKNOWN),
    ],
)
def test_a_driver_that_refuses_is_no_cpu(call: str, code: int, nvml_process: NvmlProcess) -> None:
    bare = call.removesuffix("WithFlags").removesuffix("_v2")
    with pytest.raises(ConfigError, match=f"refused {bare}.*CUDA_VISIBLE_DEVICES= .empty. uses the CPU"):
        found(nvml_process, Machine((A100_GPU,), {call: code}))


def test_a_mig_device_has_its_own_name_and_memory_and_its_gpus_capability(nvml_process: NvmlProcess) -> None:
    machine = found(nvml_process, Machine((SLICED,), IN_A_CONTAINER))
    assert machine == Hardware(
        "cuda", SLICES[0].name, (8, 0), SLICES[0].mebibytes << 20, 1, Driver("580.65.06", (13, 0))
    )
    with pytest.raises(ConfigError, match="LOCAL_RANK is 1, but only 1 GPU"):
        device(machine, 1)


def test_gpus_of_several_kinds_are_planned_for_as_the_smallest(nvml_process: NvmlProcess) -> None:
    mixed = Machine((A100_GPU, T4_GPU, V100_GPU))
    machine, lines = nvml_process.ask_with_log(mixed, detect)
    assert (machine.name, machine.memory_bytes) == (T4_GPU.name, 15360 << 20)
    assert (machine.capability, machine.count) == ((7, 0), 3)
    assert "(80 GiB), Tesla T4 (15 GiB), Tesla V100" in lines[0]
    assert lines[0].endswith("planning for the smallest, Tesla T4; CUDA_VISIBLE_DEVICES chooses")


def test_an_index_that_may_mean_any_gpu_says_how_to_be_sure(nvml_process: NvmlProcess) -> None:
    mixed = Machine((A100_GPU, T4_GPU))
    machine, lines = nvml_process.ask_with_log(mixed, detect, CUDA_VISIBLE_DEVICES="0")
    assert (machine.name, machine.count) == (T4_GPU.name, 1)
    assert lines[0].endswith("CUDA_DEVICE_ORDER=PCI_BUS_ID or UUIDs say which")
    sure = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert found(nvml_process, mixed, **sure).name == A100_GPU.name


def test_a_gpu_without_memory_of_its_own_has_the_hosts(nvml_process: NvmlProcess) -> None:
    machine = Machine((Gpu("NVIDIA GB10", (12, 1), 0),), {"nvmlDeviceGetMemoryInfo": NOT_SUPPORTED})
    assert found(nvml_process, machine).memory_bytes == hardware.host().memory_bytes


def test_a_container_without_the_drivers_library_but_with_a_gpu_is_no_cpu(tmp_path: Path) -> None:
    """As with NVIDIA_DRIVER_CAPABILITIES=compute: CUDA would work, and NVML is not there to be asked."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "empty.c").touch()
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-o", str(library), str(tmp_path / "empty.c")], check=True)
    code = "from pathlib import Path; from runtime import hardware; "
    code += (
        f"print(hardware.has_gpu(Path({str(tmp_path)!r})), hardware.has_gpu(Path({str(tmp_path / 'no')!r})))"
    )
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environ, text=True) == "True False\n"


def test_peak_memory_is_the_process_s_own_and_not_that_of_who_spawned_it() -> None:
    held = b"x" * (400 << 20)
    code = "from runtime import hardware; print(hardware.peak_resident_bytes())"
    peak = int(subprocess.check_output([sys.executable, "-c", code]))
    assert 10 << 20 < peak < len(held)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"fs/cgroup/cpu.max": "max 100000"}, 4),
        ({"fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_are_physical_ones_and_within_the_containers_limit(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    siblings = {
        f"devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}" for n in range(8)
    }
    for name, text in {**siblings, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert usable_cores(tmp_path) == cores
