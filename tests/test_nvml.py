"""What the driver refuses names its call, its device and its reason, through the real pynvml."""

import re

import pytest

from runtime import nvml
from tests.nvml_standin import (
    A100,
    DRIVER_NOT_LOADED,
    NO_PERMISSION,
    NO_SUCH_CALL,
    NOT_SUPPORTED,
    SLICED,
    UNKNOWN,
    VERSION_MISMATCH,
    Machine,
    NvmlProcess,
)


def facts() -> list[object]:
    with nvml.opened():
        found = nvml.device(0)
        return [
            found.name(),
            found.memory_bytes(),
            found.capability(),
            nvml.cuda_version(),
            nvml.driver_version(),
        ]


def slice_capability() -> tuple[int, int]:
    with nvml.opened():
        return nvml.device(0).mig_devices()[0].capability()


def why_not() -> str:
    try:
        facts()
    except nvml.NvmlError as error:
        return f"{type(error).__name__}: {error}"
    return "answered"


def test_a_gpu_is_described(nvml_process: NvmlProcess) -> None:
    machine = Machine((A100,), driver="535.129.03", cuda=12020)
    assert nvml_process.ask(machine, facts) == [A100.name, 80 << 30, (8, 0), (12, 2), "535.129.03"]


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (
            "nvmlInitWithFlags",
            DRIVER_NOT_LOADED,
            "NoDriverError: the NVIDIA driver refused nvmlInit: Driver Not",
        ),
        (
            "nvmlInitWithFlags",
            VERSION_MISMATCH,
            "refused nvmlInit: RM has detected .* mismatch; .*restart the node",
        ),
        ("nvmlInitWithFlags", UNKNOWN, "NvmlError: .* nvmlInit: Unknown Error; restart the container"),
        (
            "nvmlDeviceGetMemoryInfo",
            NO_PERMISSION,
            "GetMemoryInfo for GPU 0: Insufficient Permissions; request the",
        ),
        ("nvmlDeviceGetName", 26, "nvmlDeviceGetName for GPU 0: Deprecated; see what nvidia-smi"),
        (
            "nvmlSystemGetCudaDriverVersion_v2",
            12,
            "DriverVersion_v2: .* Library Not Found; libcuda.so.1 is missing",
        ),
    ],
)
def test_a_refusal_says_what_why_and_what_to_do(
    call: str, code: int, text: str, nvml_process: NvmlProcess
) -> None:
    said = nvml_process.ask(Machine((A100,), {call: code}), why_not)
    assert re.search(text, said), said


def test_a_driver_older_than_a_call_is_asked_by_the_old_one(nvml_process: NvmlProcess) -> None:
    machine = Machine((A100,), {"nvmlSystemGetCudaDriverVersion_v2": NO_SUCH_CALL}, cuda=9020)
    assert nvml_process.ask(machine, facts)[3] == (9, 2)


def test_a_mig_device_is_asked_for_the_capability_that_its_gpu_refuses(nvml_process: NvmlProcess) -> None:
    machine = Machine((SLICED,), {"nvmlDeviceGetCudaComputeCapability": (NO_PERMISSION, SLICED.uuid)})
    assert nvml_process.ask(machine, slice_capability) == (8, 0)


def test_memory_that_is_the_hosts_is_no_figure_of_the_gpu(nvml_process: NvmlProcess) -> None:
    machine = Machine((A100,), {"nvmlDeviceGetMemoryInfo": NOT_SUPPORTED})
    assert nvml_process.ask(machine, facts)[1] is None
