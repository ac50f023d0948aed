"""Jobs on a tiny model, and how to run their processes for real."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.model_source import ModelSource
from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import DataSource, Lora, Output, TuningJob

STEPS = {"learning_rate": 1e-2, "max_steps": 24, "per_device_train_batch_size": 4}


def write_rows(path: Path, count: int = 64) -> None:
    """Write conversations of very different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n}?" + " word" * (n * 7 % 23)},
                {"role": "assistant", "content": f"it is {n * 7}"},
            ]
        }
        for n in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.parquet")
    return folder


def tiny_job(
    model: Path, rows: Path, folder: Path, /, *, training: dict[str, Any] | None = None, **settings: Any
) -> TuningJob:
    """Return a QLoRA job on the tiny model."""
    defaults: dict[str, Any] = {
        "name": "tiny",
        "model": ModelSource(name="tiny", path=model),
        "data": DataSource(folder=rows),
        "lora": Lora(r=4, alpha=8, dropout=0.1),
        "training": {**STEPS, **(training or {})},
        "output": Output(folder=folder),
        "metrics_port": None,
    }
    return TuningJob(**{**defaults, **settings})


@pytest.fixture
def make_job(tiny_llama_dir: Path, rows_dir: Path, tmp_path: Path) -> Callable[..., TuningJob]:
    """Return a maker of QLoRA jobs on the tiny model; `out` names the output folder."""

    def make(out: str = "out", **settings: Any) -> TuningJob:
        return tiny_job(tiny_llama_dir, rows_dir, tmp_path / out, **settings)

    return make


def free_port() -> int:
    """Return a port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Worker:
    """One `python -m module` (under torchrun when there are several) in a process group of its own."""

    def __init__(self, job: TuningJob, processes: int = 1, *, module: str = "runtime.tuning") -> None:
        self.paths = OutputPaths(job.output.folder)
        self.paths.work.mkdir(parents=True, exist_ok=True)
        self.paths.job.write_text(job.model_dump_json())
        command = [sys.executable, "-m", module, str(self.paths.job)]
        if processes > 1:
            command[1:2] = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
                "-m",
            ]
        self.log = self.paths.folder / "worker.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(command, stderr=stream, stdout=stream, env=environment)

    def wait(self, timeout_s: float = 120) -> int:
        """Return the exit status."""
        return self.process.wait(timeout_s)

    def wait_for_step(self, step: int, timeout_s: float = 90) -> None:
        """Return once `step` is in the metrics history; fail when the process ends before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.steps() and self.steps()[-1]["step"] >= step:
                return
            assert self.process.poll() is None, self.output()
            time.sleep(0.005)
        pytest.fail(f"no step {step} in {timeout_s} s: {self.output()}")

    def steps(self) -> list[dict[str, Any]]:
        """Return the history so far."""
        if not self.paths.history.exists():
            return []
        lines = self.paths.history.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def output(self) -> str:
        return self.log.read_text()

    def failure(self) -> dict[str, Any]:
        """Return what rank 0 recorded."""
        record: dict[str, Any] = json.loads(self.paths.failure(0).read_text())
        return record

    def adapter(self) -> bytes:
        return (self.paths.folder / "adapter_model.safetensors").read_bytes()
