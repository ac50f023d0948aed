"""How many pods with how many GPUs a Workspace becomes."""

from pathlib import Path
from typing import Any

import pytest

from runtime import gpus as known_gpus
from runtime.errors import CapacityError, ConfigError
from tests.workspace.kubernetes.test_objects import container_of, made, of_kind
from tests.workspace.manifests import serving, tuning

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


def test_unknown_gpu_is_said_and_asked_for(tmp_path: Path) -> None:
    objects, warnings = made(served("instanceType: Standard_Other"), tmp_path)
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert any(
        "Standard_Other is not known here, so memory is not planned" in warning for warning in warnings
    )
    with pytest.raises(ConfigError, match="name them with --gpu"):
        made(served("instanceType: Standard_Other"), tmp_path, gpus=4)
    machine = known_gpus.of_kind("A100-80GB")
    objects, _ = made(served("instanceType: Standard_Other"), tmp_path, gpus=4, machine=machine)
    assert of_kind("Deployment", objects)["spec"]["replicas"] == 4


def test_more_gpus_than_the_machine_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--gpus is 2, but {TYPE} has 1"):
        made(served(f"instanceType: {TYPE}"), tmp_path, gpus=2)
    with pytest.raises(ConfigError, match=f"partition.count is 2, but {TYPE} has 1"):
        made(served(f"partition: {{mode: accelerator, count: 2}}, instanceType: {TYPE}"), tmp_path)


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
