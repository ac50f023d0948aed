"""The GPUs of a Workspace's instance type."""

from pathlib import Path

import pytest

from runtime import hardware
from runtime.workspace.instances import _GPUS, gpus_of
from tests.workspace.documents import manifest, write


@pytest.mark.parametrize(
    ("size", "gpus"), [("Standard_NC6s_v3", ("V100-16GB", 1)), ("standard_nc24ads_a100_V4", ("A100-80GB", 1))]
)
def test_instance_type_in_any_case_has_its_gpus(size: str, gpus: tuple[str, int], tmp_path: Path) -> None:
    assert gpus_of(write(tmp_path, manifest(resource__instanceType=size))) == gpus


def test_unknown_instance_type_has_none(tmp_path: Path) -> None:
    assert gpus_of(write(tmp_path, manifest(resource__instanceType="Standard_B1s"))) is None


def test_every_gpu_of_the_table_can_be_planned_for() -> None:
    assert {name for name, _ in _GPUS.values()} <= set(hardware.names())
