"""Real tools: podman and containerd mount what is pushed, images of buildah, skopeo and umoci are read."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
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
    deadline = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(f"{short}/sock") == 0:
                break
        assert process.poll() is None, (short / "log").read_text()
        assert time.monotonic() < deadline, (short / "log").read_text()
        time.sleep(0.05)
    yield f"{short}/sock"
    process.terminate()
    process.wait(60)
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


@pytest.fixture
def buildah() -> Iterator[Callable[..., str]]:
    """Run buildah with a storage of its own, and give back what it prints."""
    short = Path(tempfile.mkdtemp(prefix="bud-"))
    command = ["buildah", f"--root={short}/root", f"--runroot={short}/run", "--storage-driver=overlay"]

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    yield run
    for container in run("containers", "-q").split():
        run("umount", container)
    subprocess.run(["umount", short / "root/overlay"], check=False, capture_output=True)  # on itself
    shutil.rmtree(short, ignore_errors=True)


def change_sub_and_a(root: Path) -> None:
    """`RUN rm -r /data/sub && mkdir /data/sub && …; rm /data/a.bin`: an opaque folder and a whiteout."""
    shutil.rmtree(root / "data/sub")
    (root / "data/sub").mkdir()
    (root / "data/sub/new").write_text("new")
    (root / "data/a.bin").unlink()


def change_all(root: Path) -> None:
    shutil.rmtree(root / "data")
    (root / "data").mkdir()
    (root / "data/only").write_text("only")


def change_to_a_link(root: Path) -> None:
    shutil.move(root / "data", root / "models")
    (root / "data").symlink_to("/models")
    (root / "models/link.json").symlink_to("/data/adapter_config.json")


CHANGES: dict[str, tuple[Callable[[Path], None], dict[str, bytes]]] = {
    "whiteout and opaque folder": (change_sub_and_a, {"adapter_config.json": b"{}", "sub/new": b"new"}),
    "all of data anew": (change_all, {"only": b"only"}),
    "data as a link": (
        change_to_a_link,
        {"adapter_config.json": b"{}", "link.json": b"{}", "a.bin": b"old", "sub/x": b"x"},
    ),
}


def data_folder(root: Path) -> Path:
    (root / "data/sub").mkdir(parents=True)
    for name, text in {"adapter_config.json": "{}", "a.bin": "old", "sub/x": "x"}.items():
        (root / "data" / name).write_text(text)
    return root


@needs("buildah", "skopeo")
@pytest.mark.parametrize("change", CHANGES)
def test_what_buildah_builds_and_skopeo_copies_is_read(
    open_registry: Started, buildah: Callable[..., str], tmp_path: Path, change: str
) -> None:
    """Two layers on overlay, the second with the whiteouts of what was removed."""
    make, expected = CHANGES[change]
    first = buildah("from", "scratch")
    buildah("copy", "-q", first, str(data_folder(tmp_path / "base")), "/")
    buildah("commit", "-q", first, "base:v1")
    second = buildah("from", "base:v1")
    make(Path(buildah("mount", second)))
    buildah("commit", "-q", second, "changed:v1")
    pushed, copied = fresh(open_registry.host, "buildah"), fresh(open_registry.host, "skopeo")
    buildah("push", "-q", "--tls-verify=false", "changed:v1", f"docker://{pushed}")
    subprocess.run(
        ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false", "--format=v2s2",
         f"docker://{pushed}", f"docker://{copied}"], check=True,
    )  # fmt: skip
    assert len(oci.inspect(pushed, quick()).manifest.layers) == 2
    for reference in (pushed, copied):
        back = tmp_path / reference.repository
        assert files(oci.pull(reference, back, access=quick())) == expected


@needs("umoci")
@pytest.mark.parametrize("change", CHANGES)
def test_what_umoci_repacks_is_read_as_umoci_unpacks_it(tmp_path: Path, change: str) -> None:
    make, expected = CHANGES[change]
    umoci, image = ["umoci", "--log=error"], f"{tmp_path}/layout:v1"
    subprocess.run([*umoci, "init", "--layout", tmp_path / "layout"], check=True)
    subprocess.run([*umoci, "new", "--image", image], check=True)
    subprocess.run(
        [*umoci, "insert", "--rootless", "--image", image, data_folder(tmp_path / "base"), "/"], check=True
    )
    bundle = tmp_path / "bundle"
    subprocess.run([*umoci, "unpack", "--rootless", "--image", image, bundle], check=True)
    make(bundle / "rootfs")
    subprocess.run([*umoci, "repack", "--image", image, bundle], check=True)
    assert files(oci.pull(oci.parse(f"oci:{image}"), tmp_path / "back")) == expected


@needs("umoci")
def test_an_opaque_insert_of_umoci_hides_what_was_there(tmp_path: Path) -> None:
    umoci, image = ["umoci", "--log=error"], f"{tmp_path}/layout:v1"
    subprocess.run([*umoci, "init", "--layout", tmp_path / "layout"], check=True)
    subprocess.run([*umoci, "new", "--image", image], check=True)
    insert = [*umoci, "insert", "--rootless", "--image", image]
    subprocess.run([*insert, data_folder(tmp_path / "base"), "/"], check=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/n").write_text("n")
    subprocess.run([*insert, "--opaque", tmp_path / "new", "/data/sub"], check=True)
    subprocess.run([*insert, "--whiteout", "/data/a.bin"], check=True)
    found = files(oci.pull(oci.parse(f"oci:{image}"), tmp_path / "back"))
    assert found == {"adapter_config.json": b"{}", "sub/n": b"n"}
