"""GPUs by the names that people write."""

import pytest

from runtime import gpus, instance_types
from runtime.errors import ConfigError
from runtime.hardware import compute_dtype


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("v100-16gb", "V100-16GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("T4", "T4-16GB"),
        ("a10", "A10-24GB"),
        ("A10G", "A10G-24GB"),
        ("l4", "L4-24GB"),
        ("L40S", "L40S-48GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100_80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100 NVL", "H100-94GB"),
        ("h200", "H200-141GB"),
        ("B200", "B200-180GB"),
        ("RTX 3090", "RTX-3090-24GB"),
        ("rtx3090", "RTX-3090-24GB"),
        ("3090", "RTX-3090-24GB"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti-24GB"),
        ("RTX 4090", "RTX-4090-24GB"),
        ("rtx-4080", "RTX-4080-16GB"),
        ("RTX 4080 SUPER", "RTX-4080-SUPER-16GB"),
        ("GeForce RTX 5090", "RTX-5090-32GB"),
        ("5090", "RTX-5090-32GB"),
        ("RTX 4060 Ti 16GB", "RTX-4060-Ti-16GB"),
        ("A6000", "RTX-A6000-48GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada-48GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000-96GB"),
    ],
)
def test_a_gpu_is_known_by_what_drivers_shops_and_people_call_it(written: str, kind: str) -> None:
    found = gpus.named(written)
    assert (found.hardware.name, found.hardware.count, found.assumed) == (kind, 1, None)


@pytest.mark.parametrize(
    ("written", "kind", "count"),
    [
        ("Standard_NC24ads_A100_v4", "A100-80GB", 1),
        ("standard_nc6s_v3", "V100-16GB", 1),
        ("Standard_NC80adis_H100_v5", "H100-94GB", 2),
        ("p4d.24xlarge", "A100-40GB", 8),
        ("g5.xlarge", "A10G-24GB", 1),
        ("g6e.12xlarge", "L40S-48GB", 4),
        ("a2-highgpu-1g", "A100-40GB", 1),
        ("g2-standard-4", "L4-24GB", 1),
        ("2x A100-80GB", "A100-80GB", 2),
        ("2 x RTX 4090", "RTX-4090-24GB", 2),
        ("4xL4", "L4-24GB", 4),
        ("2x g5.12xlarge", "A10G-24GB", 8),
    ],
)
def test_an_instance_type_and_a_count_say_how_many(written: str, kind: str, count: int) -> None:
    found = gpus.named(written).hardware
    assert (found.name, found.count) == (kind, count)


@pytest.mark.parametrize(
    ("written", "gib"), [("24GB", 22.35), ("24 GB", 22.35), ("24gib", 24), ("80GB", 74.5), ("12.5GiB", 12.5)]
)
def test_a_size_is_planned_for_with_what_is_assumed(written: str, gib: float) -> None:
    found = gpus.named(written)
    assert found.hardware.memory_bytes / 2**30 == pytest.approx(gib, abs=0.01)
    assert compute_dtype(found.hardware) == "bfloat16"
    assert found.assumed is not None
    assert "compute capability 8.0 or newer" in found.assumed
    # no card of that label has less
    assert gpus.named("24GB").hardware.memory_bytes <= gpus.of_kind("A10-24GB").memory_bytes


def test_the_smallest_card_of_a_name_is_taken_and_said() -> None:
    found = gpus.named("RTX 3080")
    assert found.hardware.name == "RTX-3080-10GB"
    assert found.assumed is not None
    assert "RTX-3080-12GB" in found.assumed


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("A100", "may be any of A100-40GB, A100-80GB: say which"),
        ("V100", "may be any of V100-16GB, V100-32GB: say which"),
        ("RTX 4090 Ti", "did you mean 'RTX-4090-24GB'"),
        ("Standard_NC24ads_A100_v5", "did you mean 'Standard_NC24ads_A100_v4'"),
        ("g5.xxlarge", "did you mean 'g5.xlarge'"),
        ("p4.24xlarge", "did you mean 'p4d.24xlarge'"),
        ("g4ad.xlarge", "AMD Radeon Pro V520, which this project does not run on"),
        ("Standard_NV24s_v3", r"M60 \(compute capability 5\.2\)"),
        ("trn1.2xlarge", "AWS Trainium"),
        ("Standard_B1s", "expected A100-80GB, 'RTX 4090', 24GB"),
        ("0GB", "too small"),
        ("", "no GPU ''"),
        ("nvidia", "no GPU 'nvidia'"),
    ],
)
def test_what_is_not_known_is_answered_with_the_nearest(written: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        gpus.named(written)
    assert "\n" not in str(refused.value)


def test_every_kind_is_found_by_its_own_name_alone() -> None:
    for kind in gpus._KINDS:
        assert gpus.named(kind.name).hardware == gpus.of_kind(kind.name)


def test_proposed_gpus_are_those_of_clouds_smallest_first() -> None:
    memory = [gpus.of_kind(name).memory_bytes for name in gpus.rented()]
    assert memory == sorted(memory)
    assert {"V100-16GB", "A100-80GB", "H200-141GB"} < set(gpus.rented())
    assert not any(name.startswith("RTX-4") for name in gpus.rented())


def test_every_gpu_of_an_instance_type_is_known() -> None:
    for name in instance_types.names():
        assert gpus.named(name).hardware.count >= 1


@pytest.mark.parametrize(
    ("profile", "kind", "most"),
    [
        ("1g.10gb", "A100-80GB", 7),
        ("1g.20gb", "A100-80GB", 4),
        ("2g.20gb", "A100-80GB", 3),
        ("3g.47gb", "H100-94GB", 2),
        ("7g.141gb", "H200-141GB", 1),
        ("1g.18gb+me", "H200-141GB", 7),
        ("1g.6gb", "A30-24GB", 4),
        ("2g.48gb", "RTX-PRO-6000-96GB", 2),
        ("2g.24gb", None, None),
        ("1g.35gb", "GB300-288GB", None),
    ],
)
def test_slices_of_a_gpu_are_counted(profile: str, kind: str | None, most: int | None) -> None:
    assert gpus.most_slices(profile, kind) == most


def test_no_gpu_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="one GPU at least"):
        gpus.named("0x A100-80GB")
