"""Pushed images in the engines that nodes run: podman pulls and mounts them, containerd as image volumes."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import oci
from tests.oci.conftest import Started, files, fresh, needs, quick

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts images, so needs root"),
]


@pytest.fixture
def podman() -> Iterator[list[str]]:
    """The podman command with a storage of its own."""
    short = Path(tempfile.mkdtemp(prefix="pod-"))  # podman wants a runroot of at most 50 characters
    command = ["podman", f"--root={short}/root", f"--runroot={short}/run", "--storage-driver=vfs"]
    yield [*command, "--cgroup-manager=cgroupfs", "--events-backend=file"]
    shutil.rmtree(short, ignore_errors=True)


@needs("podman")
def test_podman_pulls_the_image_and_finds_the_files(
    open_registry: Started, podman: list[str], adapter: Path
) -> None:
    reference = fresh(open_registry.host, "adapter")
    digest = oci.push(adapter, reference, access=quick())
    name = str(reference)
    subprocess.run([*podman, "pull", "-q", "--tls-verify=false", name], check=True, capture_output=True)
    inspected = json.loads(subprocess.check_output([*podman, "image", "inspect", name]))
    assert inspected[0]["Digest"] == digest
    mounted = subprocess.check_output([*podman, "image", "mount", name], text=True).strip()
    try:
        assert files(Path(mounted, "data")) == files(adapter)
    finally:
        subprocess.run([*podman, "image", "umount", name], check=True, capture_output=True)


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[str]:
    """Start a containerd of our own; return its socket."""
    short = Path(tempfile.mkdtemp(prefix="ctrd-"))  # a socket's path has at most 107 bytes
    config = f"""
version = 2
root = "{short}/root"
state = "{short}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{short}/sock"
"""
    (short / "config.toml").write_text(config)
    with (short / "log").open("wb") as log:
        process = subprocess.Popen(["containerd", "-c", short / "config.toml"], stdout=log, stderr=log)
    deadline = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(f"{short}/sock") == 0:
                break
        assert process.poll() is None, (short / "log").read_text()
        assert time.monotonic() < deadline, (short / "log").read_text()
        time.sleep(0.05)
    yield f"{short}/sock"
    process.terminate()
    process.wait(20)
    shutil.rmtree(short, ignore_errors=True)


@needs("containerd", "ctr")
def test_containerd_mounts_the_image_as_kubernetes_image_volumes_do(
    open_registry: Started, containerd: str, adapter: Path, tmp_path: Path
) -> None:
    reference = fresh(open_registry.host, "adapter")
    oci.push(adapter, reference, access=quick())
    ctr = ["ctr", "-a", containerd, "images"]
    subprocess.run([*ctr, "pull", "--plain-http", str(reference)], check=True, capture_output=True)
    place = tmp_path / "mount"
    place.mkdir()
    subprocess.run([*ctr, "mount", str(reference), place], check=True, capture_output=True)
    try:
        assert files(place / "data") == files(adapter)
    finally:
        subprocess.run([*ctr, "unmount", place], check=True, capture_output=True)
