"""The GPUs of a Workspace's instance type."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.workspace.instances import gpus_of
from runtime.workspace.manifest import read
from tests.workspace.documents import manifest, write


@pytest.mark.parametrize(
    ("size", "kind", "count"),
    [
        ("Standard_NC6s_v3", "V100-16GB", 1),
        ("standard_nc24ads_a100_V4", "A100-80GB", 1),
        ("p4d.24xlarge", "A100-40GB", 8),
        ("a2-ultragpu-2g", "A100-80GB", 2),
    ],
)
def test_instance_type_in_any_case_has_its_gpus(size: str, kind: str, count: int, tmp_path: Path) -> None:
    found = gpus_of(read(write(tmp_path, manifest(resource__instanceType=size))))
    assert (found.name, found.count) == (kind, count)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("Standard_X1", r"resource\.instanceType is 'Standard_X1', which is not known here; name its GPU"),
        ("Standard_D4s_v5", r"'Standard_D4s_v5', a machine without a GPU"),
        ("m5.2xlarge", "a machine without a GPU"),
        ("e2-standard-4", "a machine without a GPU"),
        ("Standard_NC24ads_A100_v5", r"did you mean 'Standard_NC24ads_A100_v4'"),
        ("n1-standard-8", "--gpu"),
        ("", r"resource\.instanceType is missing.*--gpu"),
        ("Standard_NV12s_v3", "M60"),
    ],
)
def test_an_unknown_instance_type_asks_for_the_gpu(size: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        gpus_of(read(write(tmp_path, manifest(resource__instanceType=size))))


def test_slice_of_a_gpu_has_the_memory_of_its_profile(tmp_path: Path) -> None:
    file = tmp_path / "slice.yaml"
    file.write_text(
        "apiVersion: kaito.sh/v1beta1\nkind: Workspace\ninference: {preset: {name: phi-4}}\n"
        "resource: {partition: {mode: mig, profile: 2g.24gb}}\n"
    )
    found = gpus_of(read(file))
    assert (found.memory_bytes, found.count) == (24 * 10**9, 1)
