"""The real image, built once, and a node to run it on. Tests skip with a reason where a tool is missing."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.contract.kubelet import Node
from tests.tuning.conftest import write_rows

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "podman", "runc", "catatonit", "mmdebstrap", "iptables")
INPUTS = (
    ".dockerignore",
    "pyproject.toml",
    "hatch_build.py",
    "constraints.txt",
    "README.md",
    "LICENSE",
    "docker",
    "presets",
    "runtime",
)

CONTAINERS = """
[containers]
# A machine that may not raise its limits cannot start containers with more than these.
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which buildah and podman work on a machine without systemd."""
    if os.geteuid() != 0:
        pytest.skip("builds and runs containers, so needs root")
    catatonit = shutil.which("catatonit") or Path("/usr/libexec/podman/catatonit").exists()
    missing = [
        tool for tool in TOOLS if shutil.which(tool) is None and not (tool == "catatonit" and catatonit)
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    config = tmp_path_factory.mktemp("containers") / "containers.conf"
    config.write_text(CONTAINERS)
    return {**os.environ, "CONTAINERS_CONF": str(config)}


@pytest.fixture(scope="session")
def base_image(containers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian made from this machine's own package sources; kept in podman's storage."""
    release = dict(re.findall(r'(?m)^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text()))
    if release.get("ID") != "debian":
        pytest.skip(f"the base image is made with Debian's packages, and this is {release.get('ID')}")
    suite = release["VERSION_CODENAME"]
    tag = f"localhost/workspace-runtime-base:{suite}"
    with _alone():
        if _exists(tag, containers):
            return tag
        archive = tmp_path_factory.mktemp("base") / "base.tar"
        command = ["mmdebstrap", "--variant=apt", "--include=ca-certificates", suite, str(archive)]
        _run([*command, *_sources(suite)], containers)
        _run(["podman", "import", "-q", str(archive), tag], containers)
    return tag


def _sources(suite: str) -> list[str]:
    """Return apt's own lists of `suite`, a mirror's where one is set."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.*")]
    kept = [path for path in sources if path.suffix in (".list", ".sources") and path.is_file()]
    return [str(path) for path in kept if suite in path.read_text()]


@pytest.fixture(scope="session")
def image(containers: dict[str, str], base_image: str) -> str:
    """This tree's image for CPUs, named after the digest of everything that goes into it."""
    wheels = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere"))
    if not os.environ.get("TORCH_INDEX") and not list(wheels.glob("torch-*+cpu-*.whl")):
        pytest.skip("set TORCH_INDEX to PyTorch's wheel index for CPUs: the usual one has CUDA builds alone")
    tag = f"localhost/workspace-runtime:test-{_digest(base_image)}"
    with _alone():
        if not _exists(tag, containers):
            output = build(tag, base_image, containers)
            assert re.search(r"built in \d+ s, \d+ MB, `runtime version` answers after \d+ ms", output), (
                output
            )
    return tag


def build(tag: str, base_image: str, environ: dict[str, str]) -> str:
    """Run docker/build.sh, as `make image` does; return what it printed."""
    given = {"BUILDER": "buildah", "ISOLATION": "chroot", "ACCELERATOR": "cpu", "BASE_IMAGE": base_image}
    done = _run([str(ROOT / "docker/build.sh")], environ | given | {"TAG": tag})
    return done.stdout


@pytest.fixture(scope="session")
def weights_image(containers: dict[str, str], image: str, tiny_llama_dir: Path) -> Iterator[str]:
    """The image with a tiny model's weights in it, and an `oras` that pulls nothing but them."""
    folder = tiny_llama_dir.parent
    tag = f"{image}-weights"
    for path in tiny_llama_dir.iterdir():
        path.chmod(0o644)  # weights are saved for their owner alone
    (folder / "oras").write_text('#!/bin/sh\n[ "$1 $3" = "pull -o" ] && cp -r /srv/weights/. "$4"\n')
    (folder / "oras").chmod(0o755)
    name = tiny_llama_dir.name
    copies = f"COPY {name} /workspace/weights\nCOPY {name} /srv/weights\nCOPY oras /usr/local/bin/oras\n"
    (folder / "Dockerfile").write_text(f"FROM {image}\n{copies}")
    _run(["buildah", "bud", "-q", "--isolation", "chroot", "-t", tag, str(folder)], containers)
    yield tag
    _run(["podman", "rmi", "-f", tag], containers)


@pytest.fixture(scope="session")
def gateway(containers: dict[str, str], image: str) -> str:
    """The address under which containers reach this machine; podman brings it up with a first container."""
    _run(["podman", "run", "--rm", "--entrypoint", "true", image], containers)
    found = json.loads(_run(["podman", "network", "inspect", "podman"], containers).stdout)[0]
    address: str = found["subnets"][0]["gateway"]
    return address


class Registry:
    """docker-registry, open to containers."""

    def __init__(self, program: str, address: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        self.address = f"{address}:{port}"
        config = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": self.address, "secret": "x"},
        }
        (folder / "config.yml").write_text(json.dumps(config))
        self.process = subprocess.Popen(
            [program, "serve", str(folder / "config.yml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait(address, port)

    def _wait(self, address: str, port: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
                return
            time.sleep(0.05)
        raise AssertionError("docker-registry did not start")


@pytest.fixture(scope="session")
def registry(gateway: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("not installed: docker-registry")
    started = Registry(program, gateway, tmp_path_factory.mktemp("registry"))
    yield started
    started.process.terminate()
    started.process.wait(60)


@pytest.fixture(scope="session")
def data_url(gateway: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a few conversations are served to containers."""
    folder = tmp_path_factory.mktemp("served")
    write_rows(folder / "train-00000-of-00001.parquet", 8)
    server = ThreadingHTTPServer((gateway, 0), partial(_Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://{gateway}:{server.server_port}/train-00000-of-00001.parquet"
    server.shutdown()
    thread.join()
    server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def node(containers: dict[str, str], image: str, tmp_path: Path) -> Iterator[Node]:
    """A node with the image on it."""
    yield Node(tmp_path / "node", containers, {})


def _digest(base_image: str) -> str:
    seen = hashlib.sha256(base_image.encode())
    for name in INPUTS:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts:
                seen.update(f"{path.relative_to(ROOT)} {path.stat().st_mode}".encode() + path.read_bytes())
    return seen.hexdigest()[:16]


def _exists(tag: str, environ: dict[str, str]) -> bool:
    return subprocess.run(["podman", "image", "exists", tag], check=False, env=environ).returncode == 0


def _run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One build at a time on a machine: a test run beside this one then finds the image made."""
    with Path("/tmp/workspace-runtime-image.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
