"""docker/preset.Dockerfile: an image that serves a preset without a network, where its licence allows one."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.conftest import ROOT
from tests.contract.kubelet import Node

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]  # the image is built first


def bake(
    image: str, preset: str, tag: str, weights: Path, environ: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    arguments = [
        "--build-arg",
        f"IMAGE={image}",
        "--build-arg",
        f"PRESET={preset}",
        "--volume",
        f"{weights}:/weights:ro",
    ]
    command = [
        "buildah",
        "bud",
        "--isolation",
        "chroot",
        "-f",
        "docker/preset.Dockerfile",
        "-t",
        tag,
        *arguments,
        ".",
    ]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture
def tag(node: Node) -> Iterator[str]:
    name = "localhost/kaito-phi-3-mini-128k-instruct:test"
    yield name
    node.podman("rmi", "-f", name, check=False)


def test_baked_weights_are_served_under_the_presets_name(
    node: Node, image: str, tag: str, tiny_llama_dir: Path, containers: dict[str, str]
) -> None:
    done = bake(image, "phi-3-mini-128k-instruct", tag, tiny_llama_dir, containers)
    assert done.returncode == 0, done.stderr
    output = node.podman("run", "--rm", "--network", "none", tag, "serve", "--dry-run", "--json").stdout
    settings = json.loads(output)["settings"]
    assert settings["served_name"]["value"] == "phi-3-mini-128k-instruct"
    assert settings["model.path"]["value"] == "/workspace/weights"


def test_a_licence_that_forbids_passing_weights_on_is_refused(
    image: str, tiny_llama_dir: Path, containers: dict[str, str]
) -> None:
    done = bake(image, "llama-3.1-8b-instruct", "localhost/none:test", tiny_llama_dir, containers)
    assert done.returncode != 0
    assert "sets conditions on passing weights on" in done.stdout + done.stderr
