"""The README's two lines under a real docker engine: published ports, its health checks, its signals."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.contract.test_image import MANIFEST
from tests.tuning.conftest import write_rows

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]  # the image is built first


class Docker:
    """An engine of its own, without firewall rules: it publishes ports by its proxy, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.host = f"unix://{folder}/docker.sock"
        limits = {"nofile": 20_000, "nproc": 32_768}  # what a machine that may not raise its own allows
        config = {
            "data-root": f"{folder}/data", "exec-root": f"{folder}/exec", "pidfile": f"{folder}/docker.pid",
            "hosts": [self.host], "bip": "172.31.231.1/24", "iptables": False, "ip-forward": False,
            "ip-masq": False, "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "default-ulimits": {name: {"Name": name, "Hard": n, "Soft": n} for name, n in limits.items()},
        }  # fmt: skip
        (folder / "daemon.json").write_text(json.dumps(config))
        self.log = folder / "dockerd.log"
        with self.log.open("w") as log:
            command = ["dockerd", "--config-file", str(folder / "daemon.json")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while self("version", check=False).returncode:
            if self.process.poll() is not None:
                pytest.skip(f"dockerd does not run here: {self.log.read_text().splitlines()[-1]}")
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["docker", *words], env={**os.environ, "DOCKER_HOST": self.host},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr}{done.stdout}"
        return done

    def inspect(self, name: str, template: str) -> str:
        return self("inspect", name, "--format", template).stdout.strip()

    def stop(self) -> None:
        """End every container, and the engine; its data goes with its folder."""
        running = self("ps", "-aq", check=False).stdout.split()
        if running:
            self("rm", "-f", *running, check=False)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@pytest.fixture(scope="module")
def docker(
    containers: dict[str, str], image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Docker]:
    missing = [tool for tool in ("dockerd", "docker", "docker-proxy") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("docker")
    engine = Docker(folder)
    try:
        engine.wait()
        archive = folder / "image.tar"
        save = ["podman", "save", "-q", "--format", "docker-archive", "-o", str(archive), image]
        subprocess.run(save, check=True, capture_output=True, env=containers)
        engine("load", "-q", "-i", str(archive))
        archive.unlink()
        yield engine
    finally:
        engine.stop()
        shutil.rmtree(folder / "data", ignore_errors=True)


@pytest.fixture
def job(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A folder as `-v $PWD:/job` mounts it, writable for group 0; model, rows and manifest in it."""
    tmp_path.chmod(0o755)
    for name in ("results", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o775)
        os.chown(tmp_path / name, -1, 0)
    write_rows(tmp_path / "data/rows.parquet", 16)
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        path.chmod(0o644)
    at_job = MANIFEST
    for place in ("/model", "/data", "/results"):
        at_job = at_job.replace(f": {place}}}", f": /job{place}}}")
    (tmp_path / "workspace.yaml").write_text(at_job.replace("STEPS", "3"))
    return tmp_path


def test_tune_and_serve_as_the_readme_says(docker: Docker, image: str, job: Path) -> None:
    mount = ["-v", f"{job}:/job"]
    done = docker("run", "--rm", *mount, image, "tune", "/job/workspace.yaml", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (job / "results/fine_tuning_completed.txt").is_file()

    command = ["serve", "/job/model", "--adapter", "tuned=/job/results"]
    docker("run", "-d", "--name", "server", *mount, "-p", "127.0.0.1:0:80", image, *command)
    address = docker("port", "server", "80").stdout.strip()
    assert docker.inspect("server", "{{.State.Health.Status}}") in {"starting", "healthy"}
    deadline = time.monotonic() + 300
    while docker.inspect("server", "{{.State.Health.Status}}") != "healthy":
        assert time.monotonic() < deadline, docker("logs", "server").stderr
        time.sleep(0.5)
    while httpx.get(f"http://{address}/readyz", timeout=60).status_code != 200:  # healthy is alive
        assert time.monotonic() < deadline, docker("logs", "server").stderr
        time.sleep(0.2)
    body = {"prompt": "hello", "adapter": "tuned", "max_new_tokens": 3}
    answer = httpx.post(f"http://{address}/chat", content=json.dumps(body), timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3
    docker("stop", "-t", "60", "server")
    assert docker.inspect("server", "{{.State.ExitCode}}") == "0"  # 137 where it had to be killed


def test_a_mount_that_is_closed_to_the_user_is_one_line(docker: Docker, image: str, job: Path) -> None:
    job.chmod(0o700)
    done = docker("run", "--rm", "-v", f"{job}:/job", image, "tune", "/job/workspace.yaml", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: /job/workspace.yaml: permission denied for user 10001 with group 0; ")


def test_stopped_training_leaves_a_checkpoint(docker: Docker, image: str, job: Path) -> None:
    manifest = job / "workspace.yaml"
    manifest.write_text(manifest.read_text().replace("max_steps: 3", "max_steps: 100000"))
    locked = ["--user", "12345:0", "--read-only", "--cap-drop=ALL", "-v", f"{job}/cache:/cache"]
    command = ["tune", "/job/workspace.yaml"]
    docker("run", "-d", "--name", "job", *locked, "-v", f"{job}:/job", image, *command)
    deadline = time.monotonic() + 120
    while '"msg": "step ' not in (logs := docker("logs", "job").stderr):
        assert time.monotonic() < deadline, logs
        assert docker.inspect("job", "{{.State.Status}}") == "running", logs
        time.sleep(0.2)
    docker("stop", "-t", "30", "job")
    assert docker.inspect("job", "{{.State.ExitCode}}") == "143"
    assert list((job / "results").rglob("checkpoint-*"))
