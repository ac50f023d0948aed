"""The files that controllers name, started as controllers start them, without a container."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from tuning.conftest import write_rows

from runtime.pod import probes

FILES = Path(__file__).parents[2] / "docker/workspace"
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


@contextmanager
def started(command: list[str], log: Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env=ENVIRON | environ,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answer(url: str, process: subprocess.Popen[bytes], log: Path, within_s: float = 90) -> httpx.Response:
    """Return the first successful answer."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            found = httpx.get(url, timeout=5)
        except httpx.TransportError:
            found = None
        if found is not None and found.is_success:
            return found
        time.sleep(0.1)
    pytest.fail(f"{url}: {log.read_text()}")


def free_port(above: int = 5000) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port > above:
            return port


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows under the name that downloaders before v0.7 gave the file."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.parquet", 24)
    (folder / "rows.parquet").rename(folder / "rows.parquet_download_true")
    return folder


@pytest.fixture
def configured(tmp_path: Path, tiny_llama_dir: Path, rows: Path) -> dict[str, str]:
    """The variables that lead fine_tuning.py to a tiny model, a few rows and an output folder."""
    config = {
        "ModelConfig": {"pretrained_model_name_or_path": str(tiny_llama_dir), "torch_dtype": "bfloat16"},
        "QuantizationConfig": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "LoraConfig": {"r": 4, "lora_alpha": 8},
        "TrainingArguments": {"output_dir": str(tmp_path / "results"), "max_steps": 2},
        "DatasetConfig": {"train_test_split": 1},
    }
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump({"training_config": config}))
    return {"YAML_FILE_PATH": str(tmp_path / "training_config.yaml"), "DATASET_FOLDER_PATH": str(rows)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fine_tuning_writes_adapter_and_sentinel(
    processes: int, configured: dict[str, str], tmp_path: Path
) -> None:
    """With flags that v0.6 to v0.9 send by mistake."""
    stray = ["--torch_dtype=auto", "--pipeline=text-generation", "--trust_remote_code"]
    command = [
        ACCELERATE,
        "launch",
        f"--num_processes={processes}",
        str(FILES / "tfs/fine_tuning.py"),
        *stray,
    ]
    log = tmp_path / "log"
    port = {"MASTER_PORT": str(free_port())}
    with started(command, log, **configured, **port) as process:
        assert process.wait(180) == 0, log.read_text()
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "fine_tuning_completed.txt"} <= found
    assert (
        (tmp_path / "results/fine_tuning_completed.txt").read_text().startswith("Fine-Tuning completed at ")
    )
    assert "flags without meaning here" in log.read_text()


def test_fine_tuning_without_data_says_so_and_leaves_no_sentinel(
    configured: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    log = tmp_path / "log"
    command = [sys.executable, str(FILES / "tfs/fine_tuning.py")]
    with started(command, log, **configured | {"DATASET_FOLDER_PATH": str(tmp_path / "empty")}) as process:
        assert process.wait(90) == 3, log.read_text()
    assert not (tmp_path / "results/fine_tuning_completed.txt").exists()
    last = [json.loads(line) for line in log.read_text().splitlines() if '"error"' in line][-1]
    assert str(tmp_path / "empty") in last["msg"]


@pytest.mark.slow
def test_both_inference_apis_serve_and_drain(tiny_llama_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    commands = {
        "tfs": ["--pretrained_model_name_or_path", str(tiny_llama_dir), "--pipeline=text-generation"],
        "vllm": [f"--model={tiny_llama_dir}", "--served-model-name=tiny", f"--download-dir={tmp_path}"],
    }
    for runtime, flags in commands.items():
        log, base = tmp_path / f"{runtime}.log", f"http://127.0.0.1:{port}"
        command = [sys.executable, str(FILES / runtime / "inference_api.py"), *flags]
        assert probes.benchmark(base, output=tmp_path / "none") == 1
        assert not (tmp_path / "none").exists()
        with started(command, log, LOCAL_RANK=str(port - 5000)) as process:
            assert answer(f"{base}/health", process, log).json() == {"status": "Healthy"}
            assert answer(f"{base}/healthz", process, log).json() == {"status": "Healthy"}
            body = {"prompt": "hello", "generate_kwargs": {"max_new_tokens": 4}}
            assert "Result" in httpx.post(f"{base}/chat", json=body, timeout=60).json()
            assert "Model loaded successfully" in log.read_text()
            if runtime == "vllm":
                assert httpx.get(f"{base}/v1/models").json()["data"][0]["id"] == "tiny"
                assert probes.benchmark(base, output=tmp_path / "said") == 0
                assert (
                    probes.node_health(["readiness", "--leader-address=127.0.0.1", f"--vllm-port={port}"])
                    == 0
                )
            process.terminate()
            assert process.wait(15) == 0, log.read_text()
    settings, result = (tmp_path / "said").read_text().splitlines()
    assert settings.startswith("KAITO_BENCHMARK_CONFIG {")
    figures = json.loads(result.removeprefix("KAITO_BENCHMARK_RESULT "))
    assert figures["vllm_total_tpm"] > 0
    assert figures["ttft_avg_ms"] > 0


def test_benchmark_counts_what_streams_took() -> None:
    streams = [probes.Stream(0.1, 0.4, 4, 10), probes.Stream(0.3, 0.3, 1, 5)]
    assert probes.summary(streams, 2.0) == {
        "vllm_total_tpm": 600.0,
        "ttft_avg_ms": 200.0,
        "tpot_avg_ms": 100.0,
    }


def test_metrics_server_leaves_its_port_to_the_training_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started([sys.executable, str(FILES / "tfs/metrics_server.py")], log) as process:
        assert process.wait(20) == 0
    assert "the training process itself answers" in log.read_text()


def test_multi_node_serving_is_refused_with_what_to_do() -> None:
    done = subprocess.run(
        [FILES / "vllm/multi-node-serving.sh", "leader"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "resource.count to 1" in done.stderr
