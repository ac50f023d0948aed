"""The compute type follows the GPU: bfloat16 only where it is native, never on a CPU by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.hardware import Hardware, compute_dtype, detect, device, usable_cores

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
