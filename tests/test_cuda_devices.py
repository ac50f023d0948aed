"""CUDA_VISIBLE_DEVICES and MIG by CUDA's own rules, on the GPUs of a stand-in for the driver's library."""

import functools
from dataclasses import replace

import pytest

from runtime import cuda_devices, nvml
from runtime.errors import ConfigError
from tests.nvml_standin import (
    A100,
    GPU_IS_LOST,
    H100,
    IN_A_CONTAINER,
    NO_PERMISSION,
    NO_SUCH_CALL,
    SLICED,
    SLICES,
    T4,
    V100,
    Gpu,
    Machine,
    NvmlProcess,
)

FOUR = Machine((A100, T4, V100, H100))
TWINS = Machine((
    Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920, uuid="GPU-8932f937-0000-4106-c12f-20bd9faed9f6"),
    Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920, uuid="GPU-8932aaaa-0000-4106-c12f-20bd9faed9f6"),
))  # fmt: skip
FIRST, SECOND = SLICES
OLD_NAME = f"MIG-{SLICED.uuid}/7/0"
OF_AN_OLD_DRIVER = replace(SLICED, mig=(replace(FIRST, uuid=OLD_NAME),))


def uuids(setting: str | None, order: str | None = None) -> list[str]:
    with nvml.opened():
        return [device.uuid() for device in cuda_devices.visible(setting, order=order).devices]


def planned_for(setting: str | None, order: str | None = None) -> list[str]:
    with nvml.opened():
        return [device.name() for device in cuda_devices.visible(setting, order=order).kinds]


@pytest.mark.parametrize("setting", ["", "  ", "-1", "-1,0", "NoDevFiles", "none", "void"])
def test_the_cpu_is_requested(setting: str) -> None:
    assert cuda_devices.none_requested(setting)


@pytest.mark.parametrize("setting", [None, "0", "9", "GPU-1", "0,-1", "all", ",0"])
def test_the_cpu_is_not_requested(setting: str | None) -> None:
    assert not cuda_devices.none_requested(setting)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [A100, T4, V100, H100]),
        ("2,1", [V100, T4]),
        ("0,2,-1,1", [A100, V100]),
        ("0,9,1", [A100]),
        ("3,no,1", [H100]),
        (" 1, 0", [T4, A100]),
        ("+1", [T4]),
        ("1gpu2,2ampere", [T4, V100]),
        ("2,GPU-8932", [V100]),
        ("GPU-8932f937", [A100]),
        (f"{T4.uuid},GPU-9", [T4, H100]),
        (" GPU-9", [H100]),
        ("GPU-75,GPU-none,GPU-9", [T4]),
        ("GPU-75,0", [T4]),
    ],
)
def test_the_setting_means_what_it_means_to_cuda(
    setting: str | None, expected: list[Gpu], nvml_process: NvmlProcess
) -> None:
    found = nvml_process.ask(FOUR, functools.partial(uuids, setting))
    assert found == [gpu.uuid for gpu in expected]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("9", "'9' is none of the 4 GPU"),
        ("all", "'all' is neither an index nor a UUID"),
        ("gpu-8932f937", "neither an index nor a UUID"),
        (",0", "'' is neither"),
        ("GPU-ffff", "'GPU-ffff' is no UUID of a GPU here"),
        ("GPU-", "'GPU-' is the beginning of several UUIDs"),
        ("MIG-11111111", "no UUID of a GPU here"),
        ("0,0", "'0' is there twice"),
        ("1,+1", "'.1' is there twice"),
        ("GPU-75,GPU-75f9", "'GPU-75f9' is there twice"),
    ],
)
def test_a_setting_by_which_cuda_sees_nothing_is_refused(
    setting: str, why: str, nvml_process: NvmlProcess
) -> None:
    with pytest.raises(ConfigError, match=rf"CUDA_VISIBLE_DEVICES is '.*': .*{why}.*CUDA sees no GPU"):
        nvml_process.ask(FOUR, functools.partial(uuids, setting))


def test_what_a_wrong_entry_hides_is_said(nvml_process: NvmlProcess) -> None:
    _, lines = nvml_process.ask_with_log(FOUR, functools.partial(uuids, "0,9,1"))
    why = "CUDA_VISIBLE_DEVICES is '0,9,1': '9' is none of the 4 GPU(s), 0 to 3"
    assert lines == [f"{why}, so CUDA sees only the 1 before it"]


def test_a_lost_gpu_hides_no_other(nvml_process: NvmlProcess) -> None:
    lost = Machine(FOUR.gpus, {"nvmlDeviceGetHandleByIndex_v2": (GPU_IS_LOST, A100.uuid)})
    assert nvml_process.ask(lost, functools.partial(uuids, "1")) == [T4.uuid]
    assert nvml_process.ask(lost, functools.partial(uuids, "GPU-90a1")) == [H100.uuid]


def test_an_index_of_gpus_of_several_kinds_is_planned_for_all(nvml_process: NvmlProcess) -> None:
    names = functools.partial(planned_for, "0")
    assert nvml_process.ask(FOUR, names) == [gpu.name for gpu in FOUR.gpus]
    assert nvml_process.ask(TWINS, names) == [A100.name]
    assert nvml_process.ask(FOUR, functools.partial(planned_for, "0", "PCI_BUS_ID")) == [A100.name]
    assert nvml_process.ask(FOUR, functools.partial(planned_for, "GPU-75")) == [T4.name]


@pytest.mark.parametrize(
    ("gpus", "setting", "expected"),
    [
        ((SLICED,), None, FIRST.uuid),
        ((SLICED,), "0", FIRST.uuid),
        ((SLICED,), "GPU-8932f937", FIRST.uuid),
        ((SLICED,), "MIG-22222222", SECOND.uuid),
        ((SLICED,), f"{SECOND.uuid},{FIRST.uuid}", SECOND.uuid),
        ((SLICED,), f"MIG-{SLICED.uuid}/2/0", SECOND.uuid),
        ((SLICED,), "MIG-GPU-8932f937/7/0", FIRST.uuid),
        ((OF_AN_OLD_DRIVER,), "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/7/0", OLD_NAME),
        ((T4, SLICED), None, FIRST.uuid),
        ((T4, SLICED), "0", T4.uuid),
        ((T4, Gpu("empty", (8, 0), 1, uuid="GPU-1", mig_mode=True)), None, T4.uuid),
    ],
)
def test_a_process_gets_one_mig_device(
    gpus: tuple[Gpu, ...], setting: str | None, expected: str, nvml_process: NvmlProcess
) -> None:
    machine = Machine(gpus, IN_A_CONTAINER)
    assert nvml_process.ask(machine, functools.partial(uuids, setting)) == [expected]


def test_mig_devices_that_stay_unused_are_said(nvml_process: NvmlProcess) -> None:
    _, lines = nvml_process.ask_with_log(Machine((SLICED,)), functools.partial(uuids, None))
    assert len(lines) == 1
    assert lines[0].startswith(f"a CUDA process uses one MIG device: {FIRST.uuid}, and none of 1 more;")


def test_another_containers_mig_device_is_passed_over(nvml_process: NvmlProcess) -> None:
    machine = Machine((SLICED,), {"nvmlDeviceGetMigDeviceHandleByIndex": (NO_PERMISSION, FIRST.uuid)})
    assert nvml_process.ask(machine, functools.partial(uuids, None)) == [SECOND.uuid]


def test_mig_mode_without_a_mig_device_is_refused(nvml_process: NvmlProcess) -> None:
    machine = Machine((Gpu("NVIDIA A100", (8, 0), 40960, mig_mode=True),))
    with pytest.raises(ConfigError, match=r"GPU 0 \(NVIDIA A100\) is in MIG mode and has no MIG device"):
        nvml_process.ask(machine, functools.partial(uuids, None))


def test_a_driver_older_than_mig_has_whole_gpus(nvml_process: NvmlProcess) -> None:
    machine = Machine((V100,), {"nvmlDeviceGetMaxMigDeviceCount": NO_SUCH_CALL})
    assert nvml_process.ask(machine, functools.partial(uuids, None)) == [V100.uuid]


def test_a_driver_without_gpus_shows_none(nvml_process: NvmlProcess) -> None:
    assert nvml_process.ask(Machine(), functools.partial(uuids, "0")) == []


@pytest.mark.parametrize(
    ("setting", "shown"),
    [(None, ["0", "1"]), ("3,1", ["3", "1"]), (" 2 , 0,5", ["2", "0"]), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"])],
)
def test_each_of_several_processes_gets_one_of_the_devices_shown(
    setting: str | None, shown: list[str]
) -> None:
    assert [cuda_devices.single(setting, number) for number in range(2)] == shown
