"""A model tuned, pushed and queried, in the pods that each generation of the controller makes.

The pods are in pods/, one file each. Stand-ins: the tools' images (curl, oras, docker, skopeo) are this
image, the model is a tiny one, and a push without credentials goes to a registry on this machine.
"""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.contract.conftest import Registry
from tests.contract.kubelet import Document, Node, Pod, documents

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]  # the image is built first

PODS = Path(__file__).parent / "pods"
MAIN, SERVER = "workspace-tuning", "workspace-phi-3"


@dataclass
class Cluster:
    """A node, what lies in the namespace, and what stands for words in the manifests."""

    node: Node
    objects: list[Document]
    words: dict[str, str]

    def pod(self, name: str, **services: str) -> Pod:
        text = (PODS / f"{name}.yaml").read_text()
        for word, meaning in self.words.items():
            text = text.replace(word, meaning)
        (document,) = documents(text)
        return Pod(self.node, document, self.objects, hosts=services)


@pytest.fixture
def cluster(
    node: Node,
    weights_image: str,
    image: str,
    registry: Registry,
    data_url: str,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> Cluster:
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    pushed.chmod(0o777)
    tools = [
        "curlimages/curl",
        "docker:dind",
        "ghcr.io/oras-project/oras:v1.2.2",
        "mcr.microsoft.com/aks/skopeo:1.14.4-6",
        "registry.k8s.io/pause:latest",
    ]
    node.images |= dict.fromkeys(tools, image)
    node.images |= {f"registry.example/kaito-base:{tag}": image for tag in ("0.1.0", "0.5.0")}
    node.images["mcr.microsoft.com/oss/v2/oras-project/oras:v1.2.3"] = weights_image
    node.images |= {
        f"registry.example/kaito-phi-3-mini-128k-instruct:{tag}": weights_image for tag in ("0.0.3", "0.0.4")
    }
    words = {
        "URL_OF_ROWS": data_url,
        "PUSHED": str(pushed),
        "WEIGHTS": str(tiny_llama_dir),
        "REGISTRY": registry.address,
    }
    return Cluster(node, documents((PODS.parent / "configs.yaml").read_text()), words)


@pytest.mark.parametrize("generation", ["v0.3.0", "v0.4", "v0.8", "v0.12"])
def test_tuned_pushed_mounted_and_queried(
    generation: str, cluster: Cluster, base_image: str, tmp_path: Path
) -> None:
    node = cluster.node
    with cluster.pod(f"{generation}-tuning") as tuning:
        tuning.start()
        sidecar = tuning.spec["containers"][1]["name"]
        assert tuning.wait(MAIN) == 0, tuning.logs(MAIN)
        assert tuning.wait(sidecar, 30) == 0, tuning.logs(sidecar)
        assert tuning.message(MAIN) == ""
        results = tuning.volume("results-volume")
        assert (results / "fine_tuning_completed.txt").read_text().startswith("Fine-Tuning completed at ")
    if generation in ("v0.3.0", "v0.4"):  # the controller builds the image on busybox, and runs it
        adapter = f"localhost/my-adapter:{tmp_path.name}"
        _build_adapter(node, base_image, Path(cluster.words["PUSHED"]), adapter)
    else:
        adapter = f"{cluster.words['REGISTRY']}/my-adapter:1"
        node.podman("pull", "-q", "--tls-verify=false", adapter)
    node.images["registry.example/my-adapter:1"] = adapter

    with cluster.pod(f"{generation}-inference") as serving:
        serving.start().ready(SERVER)
        assert "Adapter added: my-adapter.v1" in serving.logs(SERVER)
        assert "Model loaded successfully" in serving.logs(SERVER)
        with cluster.pod("client", **{SERVER: serving.ip}) as client:
            assert client.start().wait("curl") == 0, client.logs("curl")
            assert isinstance(json.loads(client.logs("curl"))["Result"], str)
        assert serving.stop() == {SERVER: 0}, serving.logs(SERVER)
    node.podman("rmi", "-f", adapter)


def test_an_evicted_pod_leaves_a_checkpoint_and_says_why(cluster: Cluster) -> None:
    """Two shells and accelerate stand between the kubelet's SIGTERM and the training process."""
    template = next(o for o in cluster.objects if o["metadata"]["name"] == "qlora-params-template")
    text = template["data"]["training_config.yaml"]
    template["data"]["training_config.yaml"] = text.replace('save_strategy: "epoch"', "max_steps: 100000")
    with cluster.pod("v0.4-tuning") as pod:
        pod.start()
        deadline = time.monotonic() + 120
        while '"msg": "step ' not in pod.logs(MAIN):
            assert pod.state(MAIN)[0] == "running" and time.monotonic() < deadline, pod.logs(MAIN)
            time.sleep(0.2)
        metrics = f"http://{pod.ip}:5000/metrics"
        assert "tuning_steps_planned 100000.0" in httpx.get(metrics, timeout=60).text
        gpus = httpx.get(metrics, headers={"Accept": "application/json"}, timeout=60).json()
        assert gpus.keys() == {"gpu_info", "cpu_info"}
        code = pod.stop(MAIN)[MAIN]
        assert code not in (0, 137), pod.logs(MAIN)
        reason = json.loads(pod.message(MAIN))
        assert (reason["code"], reason["retriable"]) == (143, True)
        results = pod.volume("results-volume")
        assert list(results.rglob(f"checkpoint-{reason['step']}")), pod.logs(MAIN)
        assert not (results / "fine_tuning_completed.txt").exists()


def _build_adapter(node: Node, base: str, files: Path, tag: str) -> None:
    """What the privileged sidecar of v0.3 and v0.4 does, which has no place in a test."""
    assert {path.name for path in files.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    recipe = files.parent / "Dockerfile"
    recipe.write_text(f"FROM {base}\nADD *.json *.safetensors /data/\n")
    command = ["buildah", "bud", "-q", "--isolation", "chroot", "-f", str(recipe), "-t", tag, str(files)]
    subprocess.run(command, check=True, capture_output=True, env=dict(node.environ))
