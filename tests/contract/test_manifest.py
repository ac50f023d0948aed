"""What `runtime manifest` prints, run as a cluster would: tune, push, mount, query; and on two nodes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from runtime.cli.main import app
from tests.contract.conftest import ROOT, Registry
from tests.contract.kubelet import Document, Node, Pod, documents

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]  # the image is built first

TUNING = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: tiny}
resource: {count: NODES}
tuning:
  preset: {name: smollm2-135m-instruct, presetOptions: {modelWeightsPVC: weights}}
  method: qlora
  config: training
  input: {urls: ["URL"]}
  output: {image: "IMAGE", imagePushSecret: push}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: training}
data:
  training_config.yaml: |
    training_config:
      QuantizationConfig: {load_in_4bit: true}
      LoraConfig: {r: 4}
      TrainingArguments: {max_steps: 4, per_device_train_batch_size: 2}
      DatasetConfig: {train_test_split: 1}
"""

INFERENCE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: workspace-phi-3}
inference:
  preset: {name: smollm2-135m-instruct, presetOptions: {modelWeightsPVC: weights}}
  adapters: [{source: {name: tuned, image: "IMAGE"}}]
"""

PUSH = """
apiVersion: v1
kind: Secret
metadata: {name: push}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: '{"auths": {}}'}
"""


@pytest.fixture
def manifest(node: Node, image: str, tmp_path: Path, tiny_llama_dir: Path) -> Any:
    """A maker of the objects for a Workspace, checked against the schemas."""
    node.images["image:1"] = image
    node.claims["weights"] = tiny_llama_dir
    for path in tiny_llama_dir.iterdir():
        path.chmod(0o644)

    def make(workspace: str, *flags: str) -> list[Document]:
        (tmp_path / "workspace.yaml").write_text(workspace)
        command = ["manifest", str(tmp_path / "workspace.yaml"), "--image", "image:1", "--gpus", "0", *flags]
        done = CliRunner().invoke(app, command, obj={})
        assert done.exit_code == 0, done.output
        return documents(f"{done.stdout}---{PUSH}")

    return make


def of_kind(kind: str, objects: list[Document]) -> Document:
    (found,) = [document for document in objects if document["kind"] == kind]
    return found


def over_plain_http(job: Document) -> Document:
    """The tests' registry has no certificate."""
    job["spec"]["template"]["spec"]["containers"][0]["args"].append("--insecure")
    return job


def test_tuned_pushed_mounted_and_queried(
    manifest: Any, node: Node, registry: Registry, data_url: str
) -> None:
    adapter = f"{registry.address}/adapters/tiny:1"
    text = TUNING.replace("NODES", "1").replace("URL", data_url).replace("IMAGE", adapter)
    objects = manifest(text)
    with Pod(node, over_plain_http(of_kind("Job", objects)), objects) as tuning:
        assert tuning.start().wait("tune") == 0, tuning.logs("tune")
    node.podman("pull", "-q", "--tls-verify=false", adapter)

    objects = manifest(INFERENCE.replace("IMAGE", adapter), "--image-volumes")
    with Pod(node, of_kind("Deployment", objects), objects) as serving:
        serving.start().ready("serve")
        assert "Adapter added: tuned" in serving.logs("serve")
        name = of_kind("Service", objects)["metadata"]["name"]
        (question,) = yaml.safe_load_all((ROOT / "examples/kubernetes/curl.yaml").read_text())
        (curl,) = question["spec"]["containers"]
        # A Service's port becomes its pods' one in the cluster's network, which is not here.
        curl["command"] = [word.replace(f"//{name}/", f"//{name}:8080/") for word in curl["command"]]
        node.images[curl["image"]] = node.images["image:1"]
        with Pod(node, question, hosts={name: serving.ip}) as client:
            assert client.start().wait("curl") == 0, client.logs("curl")
            assert isinstance(json.loads(client.logs("curl"))["Result"], str)
        assert serving.stop() == {"serve": 0}, serving.logs("serve")
    node.podman("rmi", "-f", adapter)


def test_two_pods_meet_on_29500_and_tune_one_model(
    manifest: Any, node: Node, registry: Registry, data_url: str
) -> None:
    """Each has a network of its own; the Job's controller numbers them, the Service names the first."""
    adapter = f"{registry.address}/adapters/two:1"
    text = TUNING.replace("NODES", "2").replace("URL", data_url).replace("IMAGE", adapter)
    objects = manifest(text)
    first = (
        f"{of_kind('Job', objects)['metadata']['name']}-0.{of_kind('Service', objects)['metadata']['name']}"
    )

    def numbered(index: int) -> Document:
        job = json.loads(json.dumps(over_plain_http(of_kind("Job", manifest(text)))))
        job["metadata"]["name"] += f"-{index}"
        environ = job["spec"]["template"]["spec"]["containers"][0]["env"]
        environ.append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
        return job

    with Pod(node, numbered(0), objects, hosts={first: "127.0.0.1"}) as leader:  # its own name
        leader.start()
        with Pod(node, numbered(1), objects, hosts={first: leader.ip}) as other:
            other.start()
            assert other.ip != leader.ip
            assert leader.wait("tune") == 0, leader.logs("tune")
            assert other.wait("tune") == 0, other.logs("tune")
            assert "pushed" in leader.logs("tune")
            assert "pushed" not in other.logs("tune")
