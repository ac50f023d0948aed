"""Copies of checkpoints: between two nodes without a shared disk, over the loopback; and in a registry."""

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime import oci
from runtime.errors import ConfigError
from runtime.tuning import identity
from runtime.tuning.output import SENTINEL, OutputPaths
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.checkpoint_sync import check_free, registry_checkpoints
from runtime.tuning.train.checkpoints import listed, seal

STEPS = 40


@pytest.fixture
def address(rows_dir: Path) -> Iterator[str]:
    """Serve the rows, and yield their URL."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(rows_dir)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/rows.parquet"
    server.shutdown()
    server.server_close()
    thread.join()


class Node:
    """One `runtime tune` whose files all lie below `folder`."""

    def __init__(self, folder: Path, model: Path, url: str, *flags: str) -> None:
        self.folder, self.out = folder, folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {
            "data.folder": folder / "data", "lora.r": 4, "lora.dropout": 0.1, "training.max_steps": STEPS,
            "training.save_strategy": "steps", "training.save_steps": 5, "training.learning_rate": 0.01,
        }  # fmt: skip
        command = [sys.executable, "-m", "runtime", "tune", str(model), "--data", url]
        command += ["--output", str(self.out), *flags]
        command += [word for item in settings.items() for word in ("--set", "{}={}".format(*item))]
        self.log = folder / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    def output(self) -> str:
        return self.log.read_text()

    def ends(self, status: int = 0) -> None:
        assert self.process.wait(240) == status, self.output()

    def adapter(self) -> bytes:
        return (self.out / "adapter_model.safetensors").read_bytes()

    def wait_for_checkpoint(self, step: int) -> None:
        manifest = OutputPaths(self.out).checkpoints / f"checkpoint-{step}" / "manifest.json"
        deadline = time.monotonic() + 180
        while not manifest.exists():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)


def pair(root: Path, model: Path, url: str) -> list[Node]:
    """Start two nodes of one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--processes", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank"]
    return [Node(root / f"node-{rank}", model, url, *flags, str(rank)) for rank in (0, 1)]


@pytest.mark.slow
def test_two_nodes_end_with_the_adapter_of_two_processes_though_one_is_evicted(
    tmp_path: Path, tiny_llama_dir: Path, address: str
) -> None:
    alone = Node(tmp_path / "alone", tiny_llama_dir, address, "--processes", "2")
    alone.ends()

    first, second = pair(tmp_path, tiny_llama_dir, address)
    first.wait_for_checkpoint(10)
    second.process.send_signal(signal.SIGTERM)  # a spot node goes; all ranks agree on the step
    for node in (first, second):
        node.ends(143)
        last = node.output().splitlines()[-1]
        assert "with a checkpoint; run the same command again to resume" in last
        assert "Traceback" not in node.output()
    assert not listed(OutputPaths(second.out).checkpoints)
    assert (second.folder / "data/rows.parquet").is_file()  # each node fetched for itself

    shutil.rmtree(second.folder)  # its successor starts with an empty disk
    first, second = pair(tmp_path, tiny_llama_dir, address)
    for node in (first, second):
        node.ends()
    assert "resuming from checkpoint-" in first.output()
    assert first.adapter() == alone.adapter()
    assert not (second.out / SENTINEL).exists()  # no pusher on that node must find half a result
    assert not (second.out / "adapter_model.safetensors").exists()

    for node in pair(tmp_path, tiny_llama_dir, address):  # done: neither trains nor waits for the other
        node.ends()


def kept_in(make_job: Callable[..., TuningJob], image: str, name: str, **changes: Any) -> TuningJob:
    job = make_job(**changes)
    output = job.output.model_copy(update={"checkpoint_image": image})
    return job.model_copy(update={"name": name, "output": output})


def save_one(job: TuningJob, folder: Path, step: int = 5) -> None:
    """Begin as a run does, and save one checkpoint."""
    kept = registry_checkpoints(job, oci.Access())
    assert kept is not None
    kept.restore(folder, identity.requested(job))
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    seal(checkpoint)
    kept.save(checkpoint)


def test_another_jobs_checkpoints_in_a_registry_are_refused_by_name(
    tmp_path: Path, make_job: Callable[..., TuningJob]
) -> None:
    image = f"oci:{tmp_path}/layout:v1-checkpoint"
    first = kept_in(make_job, image, "tickets", training={"learning_rate": 1e-3})
    other = kept_in(make_job, image, "orders", training={"learning_rate": 1e-4})
    save_one(first, tmp_path / "first")
    check_free(first, oci.Access())  # its own
    with pytest.raises(ConfigError, match=r"another job, tickets \(learning_rate 0.001, now 0.0001\)"):
        check_free(other, oci.Access())
    with pytest.raises(ConfigError, match="step 5 of another job, tickets; name another --checkpoint"):
        save_one(other, tmp_path / "other")
    replacing = other.model_copy(update={"output": other.output.model_copy(update={"overwrite": True})})
    check_free(replacing, oci.Access())
    save_one(replacing, tmp_path / "other")
    check_free(other, oci.Access())
    kept = registry_checkpoints(other, oci.Access())
    assert kept is not None
    kept.restore(tmp_path / "again", identity.requested(other))
    assert [path.name for path in listed(tmp_path / "again")] == ["checkpoint-5"]
