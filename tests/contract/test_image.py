"""The image as docker runs it: any user, read-only, no capabilities, signals, ports, and what lies in it."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.contract.kubelet import Node
from tests.tuning.conftest import write_rows

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]  # the image is built first

LOCKED = ["--user", "12345:0", "--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL",
          "--security-opt", "no-new-privileges"]  # fmt: skip

MANIFEST = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: tiny}
tuning:
  preset: {name: /model}
  method: qlora
  config: training
  input: {volumeSource: {hostPath: {path: /data}}}
  output: {volumeSource: {hostPath: {path: /results}}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: training}
data:
  training_config.yaml: |
    training_config:
      QuantizationConfig: {load_in_4bit: true}
      LoraConfig: {r: 4}
      TrainingArguments: {max_steps: STEPS, save_steps: 1000000}
      DatasetConfig: {train_test_split: 1}
"""


class Running:
    """One container, its logs and its exit code."""

    def __init__(self, node: Node, name: str) -> None:
        self.node, self.name = node, name

    @property
    def ip(self) -> str:
        return self._inspect("{{.NetworkSettings.IPAddress}}")

    def logs(self) -> str:
        done = self.node.podman("logs", self.name, check=False)
        return done.stdout + done.stderr

    def wait_for(self, word: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while word not in self.logs():
            assert self._inspect("{{.State.Status}}") == "running", self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def stop(self) -> int:
        """Return the exit code after SIGTERM; 137 is a kill a minute later."""
        self.node.podman("stop", "-t", "60", self.name)
        return int(self._inspect("{{.State.ExitCode}}"))

    def _inspect(self, template: str) -> str:
        return self.node.podman("inspect", self.name, "--format", template).stdout.strip()


@pytest.fixture
def running(node: Node, tmp_path: Path) -> Iterator[Running]:
    """The container of this test; removed whatever happens."""
    name = f"image-{os.getpid()}-{time.monotonic_ns()}"
    yield Running(node, name)
    node.podman("rm", "-f", "-t", "0", name, check=False)


@pytest.fixture
def job(tmp_path: Path, tiny_llama_dir: Path) -> list[str]:
    """The mounts of a tuning job, for a user that owns none of them."""
    write_rows(tmp_path / "data/rows.parquet", 16)
    for name in ("results", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o775)
        os.chown(tmp_path / name, -1, 0)
    for path in tiny_llama_dir.iterdir():
        path.chmod(0o644)
    (tmp_path / "workspace.yaml").write_text(MANIFEST.replace("STEPS", "3"))
    mounts = {
        tiny_llama_dir: "/model:ro", tmp_path / "data": "/data:ro", tmp_path / "results": "/results",
        tmp_path / "cache": "/cache", tmp_path / "workspace.yaml": "/job/workspace.yaml:ro",
    }  # fmt: skip
    return [word for place, target in mounts.items() for word in ("-v", f"{place}:{target}")]


def test_tunes_and_serves_as_any_user_on_a_read_only_root(
    node: Node, image: str, running: Running, job: list[str], tmp_path: Path
) -> None:
    done = node.podman("run", "--rm", *LOCKED, *job, image, "tune", "/job/workspace.yaml", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results/adapter_model.safetensors").stat().st_uid == 12345
    assert (tmp_path / "results/fine_tuning_completed.txt").is_file()
    command = ["serve", "/model", "--adapter", "tuned=/results", "--port", "8080"]
    node.podman("run", "-d", "--name", running.name, *LOCKED, *job, image, *command)
    running.wait_for("Model loaded successfully")
    assert node.podman("healthcheck", "run", running.name, check=False).returncode == 0
    body = {"prompt": "hello", "model": "tuned", "max_new_tokens": 3}
    assert isinstance(
        httpx.post(f"http://{running.ip}:8080/chat", json=body, timeout=60).json()["Result"], str
    )
    assert running.stop() == 0, running.logs()


def test_sigterm_ends_training_with_a_checkpoint_within_the_grace_period(
    node: Node, image: str, running: Running, job: list[str], tmp_path: Path
) -> None:
    (tmp_path / "workspace.yaml").write_text(MANIFEST.replace("STEPS", "100000"))
    node.podman("run", "-d", "--name", running.name, *LOCKED, *job, image, "tune", "/job/workspace.yaml")
    running.wait_for('"msg": "step ')
    assert running.stop() == 143, running.logs()
    assert list((tmp_path / "results").rglob("checkpoint-*")), running.logs()
    assert not (tmp_path / "results/fine_tuning_completed.txt").exists()


def test_port_80_needs_no_root_where_the_machine_allows_it_and_a_clear_error_elsewhere(
    node: Node, image: str, running: Running, tiny_llama_dir: Path
) -> None:
    model = ["-v", f"{tiny_llama_dir}:/model:ro"]
    closed = ["--sysctl", "net.ipv4.ip_unprivileged_port_start=1024"]
    done = node.podman("run", "--rm", *closed, *model, image, "serve", "/model", check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "port 80" in line and "--port" in line and "NET_BIND_SERVICE" in line
    opened = ["--sysctl", "net.ipv4.ip_unprivileged_port_start=0"]
    node.podman("run", "-d", "--name", running.name, *opened, *model, image, "serve", "/model")
    running.wait_for("Listening on 0.0.0.0 port 80")


def test_a_shell_keeps_names_that_adapters_have(node: Node, image: str) -> None:
    """dash drops variables with - or . in their names, and an adapter's strength is one."""
    command = [
        "--entrypoint",
        "/bin/sh",
        "-e",
        "my-adapter.v1=0.5",
        image,
        "-c",
        "env; cd /tmp; exec python3 --version",
    ]
    done = node.podman("run", "--rm", *command)
    assert "my-adapter.v1=0.5" in done.stdout
    assert "Python 3" in done.stdout


def test_a_cpu_limit_is_the_number_of_threads(node: Node, image: str) -> None:
    command = [
        "--entrypoint",
        "python3",
        image,
        "-c",
        "from runtime import hardware as h; print(h.usable_cores())",
    ]
    assert node.podman("run", "--rm", "--cpus", "1.5", *command).stdout == "1\n"


def test_the_engine_has_its_kernels_and_the_image_no_compiler(node: Node, image: str) -> None:
    script = "from runtime.serving.engine.kernels import Kernels as k; print(k.find() is not None)"
    assert node.podman("run", "--rm", "--entrypoint", "python3", image, "-c", script).stdout == "True\n"
    assert (
        "gcc"
        not in node.podman("run", "--rm", "--entrypoint", "/bin/sh", image, "-c", "type gcc cc || :").stdout
    )


def test_what_controllers_name_is_there(node: Node, image: str) -> None:
    script = (
        "set -e; pwd; command -v accelerate torchrun python3 curl bash apt-get; "
        "ls tfs/inference_api.py fine_tuning.py metrics_server.py ../vllm/benchmark_entrypoint.py "
        "../vllm/export_sas_token_for_streaming.sh ../vllm/list_supported_llm_archs.py ../cuda-provision.sh; "
        "readlink -f weights /workspace/vllm/weights; cat /workspace/version.txt; "
        "ls /workspace/chat_templates"
    )
    found = node.podman("run", "--rm", "--entrypoint", "/bin/sh", image, "-c", script).stdout.splitlines()
    assert found[0] == "/workspace/tfs"
    assert found.count("/workspace/weights") == 2
    assert {"phi-3.jinja", "llama-3-instruct.jinja", "mistral-instruct.jinja"} <= set(found)


def test_the_image_says_what_is_in_it(node: Node, image: str) -> None:
    found = json.loads(node.podman("image", "inspect", image).stdout)[0]
    labels = {name.rpartition(".")[2]: value for name, value in found["Labels"].items()}
    assert labels["version"] == node.podman("run", "--rm", image, "version").stdout.strip()
    assert re.fullmatch("[0-9a-f]{40}|unknown", labels["revision"])
    assert (labels["licenses"], labels["accelerator"]) == ("Apache-2.0", "cpu")
    assert found["User"] == "10001:0"
    assert found["Config"]["Entrypoint"] == ["runtime"]
    place = "/usr/share/doc/workspace-runtime"
    bill = json.loads(
        node.podman("run", "--rm", "--entrypoint", "cat", image, f"{place}/sbom.cdx.json").stdout
    )
    parts = {part["name"]: part for part in bill["components"]}
    assert parts["torch"]["version"].startswith("2.13.0")
    assert parts["workspace-runtime"]["version"] == labels["version"]
    assert (
        "Apache License"
        in node.podman("run", "--rm", "--entrypoint", "cat", image, f"{place}/LICENSE").stdout
    )
