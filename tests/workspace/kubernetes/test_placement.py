"""How many pods with how many GPUs a Workspace becomes."""

from pathlib import Path
from typing import Any

import pytest

from runtime import gpus as known_gpus
from runtime.errors import CapacityError, ConfigError
from tests.workspace.kubernetes.test_objects import container_of, made, of_kind
from tests.workspace.manifests import MAP, serving, tuning

TYPE = "Standard_NC24ads_A100_v4"
LARGE = "llama-3.3-70b-instruct"


def served(resource: str, preset: str = "phi-4") -> str:
    return serving("{instanceType: " + TYPE, "{" + resource).replace("phi-4", preset)


@pytest.mark.parametrize(
    ("resource", "preset", "pods", "gpus"),
    [
        (f"instanceType: {TYPE}", "phi-4", 1, 1),
        (f"count: 3, instanceType: {TYPE}", "phi-4", 3, 1),
        ("instanceType: Standard_NC96ads_A100_v4", "phi-4", 4, 1),  # a model a GPU
        ("count: 2, instanceType: Standard_NC96ads_A100_v4", "phi-4", 8, 1),
        ("instanceType: Standard_NC48ads_A100_v4", LARGE, 1, 2),  # one GPU does not hold it
        ("count: 2, instanceType: Standard_NC48ads_A100_v4", LARGE, 2, 2),
        ("instanceType: Standard_ND96amsr_A100_v4", LARGE, 4, 2),  # as few GPUs a pod as hold it
    ],
)
def test_pods_have_as_few_gpus_as_hold_the_model(
    resource: str, preset: str, pods: int, gpus: int, tmp_path: Path
) -> None:
    objects, _ = made(served(resource, preset), tmp_path)
    container = container_of(objects)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == pods
    assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    assert ("--parallel" in container["args"]) == (gpus > 1)


@pytest.mark.parametrize(
    ("resource", "preset", "message"),
    [
        (
            f"count: 2, instanceType: {TYPE}",
            LARGE,
            "one model is not divided among nodes: take nodes with more",
        ),
        ("instanceType: Standard_NC4as_T4_v3", "phi-4", "one is enough of .*A100"),
        ("instanceType: Standard_NC64as_T4_v3", "falcon-40b", "falcon models cannot be divided among GPUs"),
    ],
)
def test_model_that_no_node_holds_is_refused_with_what_to_use(
    resource: str, preset: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CapacityError, match=message):
        made(served(resource, preset), tmp_path)


def test_user_may_vouch_for_the_memory(tmp_path: Path) -> None:
    text = served(f"instanceType: {TYPE}", LARGE)
    text = text.replace("{name: w}", "{name: w, annotations: {kaito.sh/bypass-resource-checks: 'True'}}")
    objects, warnings = made(text, tmp_path)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 1
    assert any(
        "does not fit" in warning and "bypass-resource-checks is set" in warning for warning in warnings
    )


def test_model_that_is_vouched_for_and_indivisible_has_a_gpu_a_pod(tmp_path: Path) -> None:
    text = served("instanceType: Standard_NC64as_T4_v3", "falcon-40b")
    text = text.replace("{name: w}", "{name: w, annotations: {kaito.sh/bypass-resource-checks: 'true'}}")
    objects, _ = made(text, tmp_path)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 4
    assert "--parallel" not in container_of(objects)["args"]


def test_quantised_weights_fit_where_whole_ones_do_not(tmp_path: Path) -> None:
    options: dict[str, Any] = {"flags": ("--quantize", "nf4"), "settings": {"quantization.bits": 4}}
    container = container_of(made(served(f"instanceType: {TYPE}", LARGE), tmp_path, **options)[0])
    assert container["args"][-2:] == ["--quantize", "nf4"]


def test_unknown_machine_asks_for_its_gpus(tmp_path: Path) -> None:
    unknown = served("instanceType: Standard_Other")
    with pytest.raises(ConfigError, match="'Standard_Other', which is not known here; name its GPU"):
        made(unknown, tmp_path)
    objects, warnings = made(unknown, tmp_path, gpus=1)
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert any("Standard_Other is not known here, so memory is not planned" in it for it in warnings)
    with pytest.raises(ConfigError, match="name them with --gpu"):
        made(unknown, tmp_path, gpus=4)
    machine = known_gpus.of_kind("A100-80GB")
    objects, _ = made(unknown, tmp_path, gpus=4, machine=machine)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 4


def test_machine_of_which_nothing_is_said_has_a_gpu(tmp_path: Path) -> None:
    objects, warnings = made(served("count: 1"), tmp_path)
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert any("the GPU is not known here, so memory is not planned" in it for it in warnings)


def test_machine_without_a_gpu_is_refused_unless_none_is_asked_for(tmp_path: Path) -> None:
    text = served("instanceType: Standard_D4s_v5")
    with pytest.raises(ConfigError, match="'Standard_D4s_v5', a machine without a GPU; take one with a GPU"):
        made(text, tmp_path)
    objects, _ = made(text, tmp_path, gpus=0)
    assert "limits" not in container_of(objects)["resources"]


def test_more_gpus_than_the_machine_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--gpus is 2, but {TYPE} has 1"):
        made(served(f"instanceType: {TYPE}"), tmp_path, gpus=2)
    with pytest.raises(ConfigError, match=r"partition.count is 2, but a node has 1 GPU\(s\), A100-80GB"):
        made(served(f"partition: {{mode: accelerator, count: 2}}, instanceType: {TYPE}"), tmp_path)


def test_some_gpus_of_a_node_without_a_type_are_named_by_the_user(tmp_path: Path) -> None:
    text = served("partition: {mode: accelerator, count: 2}")
    with pytest.raises(
        ConfigError, match="divided among 2 GPUs depends on their memory; name them with --gpu"
    ):
        made(text, tmp_path)
    h100 = known_gpus.of_kind("H100-80GB")
    assert of_kind("Deployment", made(text, tmp_path, machine=h100)[0])["spec"]["replicas"] == 2
    large = text.replace("phi-4", LARGE)
    assert container_of(made(large, tmp_path, machine=h100)[0])["resources"]["limits"] == {
        "nvidia.com/gpu": 2
    }
    with pytest.raises(ConfigError, match=r"partition\.count is 9"):
        made(text.replace("count: 2", "count: 9"), tmp_path, machine=known_gpus.of_kind("H100-80GB", count=8))


def _with_flags(text: str, flags: str) -> str:
    return (
        text
        + "  config: mine\n"
        + MAP.format(name="mine", key="inference_config.yaml", text=f"vllm: {{{flags}}}")
    )


@pytest.mark.parametrize(
    ("flags", "pods", "gpus"),
    [
        ("tensor-parallel-size: 2", 4, 2),
        ("tensor-parallel-size: 8", 1, 8),
        ("data-parallel-size: 4", 2, 4),
        ("gpu-memory-utilization: 0.3", 4, 2),  # 24 GiB of each hold half of the weights
        ("max-model-len: 16384, gpu-memory-utilization: 0.4", 4, 2),
    ],
)
def test_pods_have_what_their_configuration_asks_for(
    flags: str, pods: int, gpus: int, tmp_path: Path
) -> None:
    text = served(
        "instanceType: Standard_ND96amsr_A100_v4", "phi-4" if "0." in flags else "llama-3.1-8b-instruct"
    )
    if "utilization: 0.4" in flags:
        assert container_of(made(text, tmp_path)[0])["resources"]["limits"] == {"nvidia.com/gpu": 1}
    objects, _ = made(_with_flags(text, flags), tmp_path)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == pods
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    by_the_plan = "0." in flags
    assert ("--parallel" in container_of(objects)["args"]) == by_the_plan


def test_flags_that_the_node_cannot_carry_out_are_refused(tmp_path: Path) -> None:
    text = served(f"instanceType: {TYPE}", "llama-3.1-8b-instruct")
    with pytest.raises(ConfigError, match="processes is 2, each on a GPU of its own, and a node has 1"):
        made(_with_flags(text, "tensor-parallel-size: 2"), tmp_path)
    eight = served("instanceType: Standard_ND96amsr_A100_v4", "llama-3.1-8b-instruct")
    with pytest.raises(
        ConfigError, match="parallel tp with 3 processes: 32 attention heads cannot be divided"
    ):
        made(_with_flags(eight, "tensor-parallel-size: 3"), tmp_path)
    with pytest.raises(CapacityError, match="does not fit on the GPUs of one node, A100-80GB"):
        made(_with_flags(text, "gpu-memory-utilization: 0.1"), tmp_path)


def test_gpus_that_are_left_over_and_context_that_is_not_served_are_said(tmp_path: Path) -> None:
    text = served("instanceType: Standard_ND96amsr_A100_v4")
    _, warnings = made(_with_flags(text, "data-parallel-size: 3"), tmp_path)
    assert "2 of the 8 GPUs of each node are not used: a server has 3" in warnings
    _, warnings = made(_with_flags(text, "max-model-len: 100000"), tmp_path)
    assert "limits.context_tokens is 100000, but phi-4 was made for 16384: so many are served" in warnings


def test_copies_of_a_model_have_a_gpu_each(tmp_path: Path) -> None:
    kind = served("instanceType: Standard_ND96isr_H100_v5", "phi-4-mini-instruct")
    objects, _ = made(kind, tmp_path, settings={"replicas": 2})
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 4
    assert container_of(objects)["resources"]["limits"]["nvidia.com/gpu"] == 2
    with pytest.raises(ConfigError, match="replicas is 9, each on a GPU of its own, and a node has 8"):
        made(kind, tmp_path, settings={"replicas": 9})
    slices = served("partition: {mode: mig, profile: 1g.20gb, count: 2}", "phi-4-mini-instruct")
    with pytest.raises(ConfigError, match="replicas is 2, and a process sees one MIG device"):
        made(slices, tmp_path, settings={"replicas": 2})


def test_slices_are_requested_by_their_profile(tmp_path: Path) -> None:
    objects, _ = made(
        served("partition: {mode: mig, profile: 1g.20gb+me, count: 3}", "phi-4-mini-instruct"), tmp_path
    )
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 3
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/mig-1g.20gb.me": 1}
    with pytest.raises(CapacityError, match="does not fit on the GPUs of one node, GPU of 10 GB"):
        made(served("partition: {mode: mig, profile: 1g.10gb}"), tmp_path)


@pytest.mark.parametrize(
    ("resource", "message"),
    [
        (
            f"instanceType: {TYPE}, partition: {{mode: mig, profile: 9g.999gb}}",
            "has no MIG profile '9g.999gb'; it has",
        ),
        ("partition: {mode: mig, profile: 9g.999gb}", "no GPU known here has a MIG profile '9g.999gb'"),
        (
            f"instanceType: {TYPE}, partition: {{mode: mig, profile: 1g.5gb}}",
            "A100-80GB has no MIG profile '1g.5gb'",
        ),
        (
            "instanceType: Standard_NC4as_T4_v3, partition: {mode: mig, profile: 1g.5gb}",
            "T4-16GB has no MIG profile '1g.5gb'; it has no MIG",
        ),
        (
            f"instanceType: {TYPE}, partition: {{mode: mig, profile: 3g.40gb, count: 3}}",
            "partition.count is 3, but 1 x A100-80GB has 2 slices of 3g.40gb",
        ),
    ],
)
def test_slices_that_no_gpu_has_are_refused(resource: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        made(served(resource, "phi-4-mini-instruct"), tmp_path)


def test_inference_set_has_its_replicas(tmp_path: Path) -> None:
    text = (
        "apiVersion: kaito.sh/v1alpha1\nkind: InferenceSet\nmetadata: {name: w}\nspec:\n  replicas: 3\n"
        "  nodeCountLimit: 2\n  updateStrategy: {type: OnDelete}\n  template:\n"
        f"    resource: {{instanceType: {TYPE}}}\n    inference: {{preset: {{name: phi-4}}}}\n"
    )
    objects, warnings = made(text, tmp_path)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 2
    assert any("nodeCountLimit' is 2: so many replicas, not 3" in warning for warning in warnings)
    assert any("updateStrategy' has no effect" in warning for warning in warnings)


def test_tuning_has_all_gpus_of_each_node(tmp_path: Path) -> None:
    objects, _ = made(tuning(TYPE, "Standard_NC96ads_A100_v4"), tmp_path)
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container_of(made(tuning(TYPE, TYPE), tmp_path, gpus=0)[0])["resources"].keys() == {"requests"}


def test_tuning_that_does_not_fit_is_refused_as_by_plan(tmp_path: Path) -> None:
    text = tuning(TYPE, "Standard_NC4as_T4_v3").replace(
        "phi-3-mini-128k-instruct", "qwen2.5-coder-32b-instruct"
    )
    with pytest.raises(CapacityError, match=r"needs .* GiB"):
        made(text, tmp_path)
    vouched = text.replace("{name: w}", "{name: w, annotations: {kaito.sh/bypass-resource-checks: 'true'}}")
    assert any("bypass-resource-checks is set" in warning for warning in made(vouched, tmp_path)[1])
