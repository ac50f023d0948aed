"""The clouds' machines, held to the figures of the controller's own tables."""

import pytest

from runtime import gpus, instance_types

CONTROLLER = {  # SKU, number of GPUs, GB of all GPUs together
    "Standard_NC6s_v3": (1, 16), "Standard_NC12s_v3": (2, 32), "Standard_NC24s_v3": (4, 64),
    "Standard_NC24rs_v3": (4, 64), "Standard_NC4as_T4_v3": (1, 16), "Standard_NC64as_T4_v3": (4, 64),
    "Standard_NV36ads_A10_v5": (1, 24), "Standard_NV72ads_A10_v5": (2, 48),
    "Standard_NC24ads_A100_v4": (1, 80), "Standard_NC48ads_A100_v4": (2, 160),
    "Standard_NC96ads_A100_v4": (4, 320), "Standard_ND96asr_A100_v4": (8, 320),
    "Standard_ND96amsr_A100_v4": (8, 640), "Standard_NC40ads_H100_v5": (1, 94),
    "Standard_NC80adis_H100_v5": (2, 188), "Standard_ND96isr_H100_v5": (8, 640),
    "Standard_NCC40ads_H100_v5": (1, 94), "Standard_ND96isr_H200_v5": (8, 1128),
    "p3.2xlarge": (1, 16), "p3.16xlarge": (8, 128), "p3dn.24xlarge": (8, 256), "p4d.24xlarge": (8, 320),
    "p4de.24xlarge": (8, 640), "p5.48xlarge": (8, 640), "p5e.48xlarge": (8, 1128),
    "p5en.48xlarge": (8, 1128), "g6.xlarge": (1, 24), "gr6.8xlarge": (1, 24), "g6.12xlarge": (4, 96),
    "g6.48xlarge": (8, 192), "g5g.xlarge": (1, 16), "g5g.metal": (2, 32), "g5.xlarge": (1, 24),
    "g5.16xlarge": (1, 24), "g5.24xlarge": (4, 96), "g5.48xlarge": (8, 192), "g4dn.xlarge": (1, 16),
    "g4dn.12xlarge": (4, 64), "g4dn.metal": (8, 128), "Standard_NC4_A2": (1, 16),
    "Standard_NC16_A16": (2, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROLLER)
def test_gpus_and_memory_are_those_of_the_controller(name: str) -> None:
    count, gigabytes = CONTROLLER[name]
    found = gpus.named(name).hardware
    assert found.count == count
    assert count * found.memory_bytes / 2**30 == pytest.approx(gigabytes, rel=0.07)


@pytest.mark.parametrize("name", ["Standard_NG32ads_V620_v1", "g4ad.8xlarge", "p2.xlarge", "inf2.24xlarge"])
def test_what_the_controller_knows_and_this_project_does_not_run_on_is_known(name: str) -> None:
    found = instance_types.find(name)
    assert found is not None
    assert found.gpu is None


@pytest.mark.parametrize(
    "name",
    [
        "Standard_D4s_v5",
        "standard_e8ads_v5",
        "Standard_HB120rs_v3",
        "c7g.large",
        "r6id.metal",
        "t2d-standard-4",
    ],
)
def test_machines_of_series_without_a_gpu_are_told(name: str) -> None:
    assert instance_types.has_no_gpu(name)


@pytest.mark.parametrize(
    "name", ["Standard_ND96_v9", "g9.xlarge", "n1-standard-8", "dl1.24xlarge", "my-node", ""]
)
def test_machines_that_may_have_one_are_not(name: str) -> None:
    assert not instance_types.has_no_gpu(name)
    assert not any(map(instance_types.has_no_gpu, instance_types.names()))


def test_no_instance_type_stands_in_two_places() -> None:
    listed = [
        name.lower()
        for table in (instance_types._NVIDIA, instance_types._OTHER)
        for counts in table.values()
        for words in counts.values()
        for name in words.split()
    ]
    assert len(listed) == len(set(listed))
