"""Kubernetes objects of a Workspace, and the examples that hold them."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from runtime.errors import EXIT_CODES, RETRIABLE, Failure
from runtime.workspace import kubernetes
from runtime.workspace.kubernetes import PodOptions

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/kubernetes"
KUBERNETES = "1.35"


INFERENCE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: served}
inference:
  preset: {name: phi-3-mini-128k-instruct, presetOptions: {modelAccessSecret: hub, modelWeightsPVC: weights}}
  adapters:
    - {source: {name: support, image: "registry.example/support:1", imagePullSecrets: [pull, pull]}}
    - {source: {name: local, volumeSource: {hostPath: {path: /srv/adapter}}}, strength: "0.5"}
"""


def objects(file: Path, **options: Any) -> list[kubernetes.Object]:
    """Return the objects of `file`, checked against Kubernetes' schemas."""
    made, _ = kubernetes.objects(file, PodOptions(image="image:1", **options))
    for document in made:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    return made


@pytest.fixture
def inference(tmp_path: Path) -> Path:
    file = tmp_path / "workspace.yaml"
    file.write_text(INFERENCE)
    return file


def test_examples_fit_the_schemas() -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] != "Workspace":
                kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_example_question_goes_to_the_service_of_the_workspace() -> None:
    service = next(
        d for d in yaml.safe_load_all((EXAMPLES / "serving.yaml").read_text()) if d["kind"] == "Service"
    )
    assert f"http://{service['metadata']['name']}/chat" in (EXAMPLES / "curl.yaml").read_text()
    assert service["spec"]["ports"][0]["port"] == 80


def test_job_fails_for_good_where_another_try_would_end_alike() -> None:
    job = next(d for d in yaml.safe_load_all((EXAMPLES / "tuning.yaml").read_text()) if d["kind"] == "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    final = {EXIT_CODES[kind] for kind in EXIT_CODES if kind not in RETRIABLE and kind is not Failure}
    by_action = {(r["action"], *r.get("onExitCodes", {}).get("values", ())) for r in rules}
    assert by_action == {("Ignore",), ("Ignore", 143), ("FailJob", *sorted(final))}
    pod = job["spec"]["template"]["spec"]
    assert all(
        r["onExitCodes"]["containerName"] == pod["containers"][0]["name"] for r in rules if "onExitCodes" in r
    )
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it


def test_pod_reads_the_manifest_as_written(inference: Path) -> None:
    map_, deployment, _ = objects(inference)
    assert map_["data"]["workspace.yaml"] == INFERENCE
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    mount = next(m for m in container["volumeMounts"] if m["name"] == "workspace")
    assert container["args"][1] == f"{mount['mountPath']}/workspace.yaml"


def test_adapters_are_pulled_by_the_server_or_mounted_by_the_node(inference: Path) -> None:
    _, deployment, _ = objects(inference)
    pod = deployment["spec"]["template"]["spec"]
    (registries,) = [v for v in pod["volumes"] if v["name"] == "registries"]
    assert [s["secret"]["name"] for s in registries["projected"]["sources"]] == ["pull"]
    _, deployment, _ = objects(inference, image_volumes=True)
    pod = deployment["spec"]["template"]["spec"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert (
        volumes[mounts["/mnt/adapter/support"]["name"]]["image"]["reference"] == "registry.example/support:1"
    )
    assert mounts["/mnt/adapter/support"]["subPath"] == "data"
    assert "hostPath" in volumes[mounts["/mnt/adapter/local"]["name"]]
    assert pod["imagePullSecrets"] == [{"name": "pull"}]


def test_weights_and_token_of_the_preset_options_are_mounted(inference: Path) -> None:
    _, deployment, _ = objects(inference, gpus=0)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "resources" not in container
    assert "tolerations" not in pod
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}
    assert "/workspace/weights" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_pod_lives_until_its_answers_are_complete(inference: Path) -> None:
    _, deployment, _ = objects(inference)
    pod = deployment["spec"]["template"]["spec"]
    (sleep,) = re.findall(r"\d+", str(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]))
    assert pod["terminationGracePeriodSeconds"] >= int(sleep) + 25 + 5


def test_several_nodes_meet_at_the_first_pod() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "two_nodes.yaml").read_text()))
    service = next(d for d in documents if d["kind"] == "Service")
    job = next(d for d in documents if d["kind"] == "Job")
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == (
        "Indexed",
        2,
        2,
    )
    pod = job["spec"]["template"]["spec"]
    environ = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert environ["NNODES"] == "2"
    # A pod of an indexed Job is called JOB-INDEX, below its subdomain, which is the headless Service.
    assert environ["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"]) == ("None", 29500)
