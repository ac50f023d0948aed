"""A server that divides its model among processes: the command's own entry, real ranks over gloo."""

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from runtime import hardware, oci
from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.serving import loading
from runtime.serving.engine.parallel.workers import Workers
from runtime.serving.settings import ServeConfig
from tests.conftest import write_tiny_tokenizer
from tests.families import model_of
from tests.serving.conftest import Process, Serve, until
from tests.serving.engine.capped import ProcessCaps

pytestmark = pytest.mark.slow


@pytest.fixture
def serve(serve: Serve) -> Serve:
    """Starts `runtime serve MODEL` with two ranks and waits until its port answers."""

    def start(model: Path, environ: Mapping[str, str] = os.environ) -> Process:
        return serve(
            model, "--parallel", "tp", "--processes", "2", environ={**environ, "OMP_NUM_THREADS": "1"}
        )

    return start


def others(site: Process) -> list[psutil.Process]:
    children = psutil.Process(site.process.pid).children()
    return [each for each in children if "runtime.serving.engine.parallel.worker" in each.cmdline()]


def stream(site: Process, lines: list[str]) -> threading.Thread:
    """Ask for a long answer in a thread and collect its events; return once the first is there."""
    body = {"prompt": "hi", "max_new_tokens": 400, "stream": True, "temperature": 0, "ignore_eos": True}

    def read() -> None:
        with httpx.stream("POST", f"{site.url}/chat", json=body, timeout=60) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: site.running() == 1, 60)
    return reader


def test_sigterm_lets_the_answer_finish_and_every_rank_end(serve: Serve, tiny_llama_dir: Path) -> None:
    site = serve(tiny_llama_dir)
    site.wait_ready(90)
    (other,) = others(site)
    lines: list[str] = []
    reader = stream(site, lines)
    assert site.stop(timeout_s=60) == 0
    reader.join(60)
    assert '"finish_reason":"length"' in "".join(lines)
    assert not other.is_running()
    assert any("All 2 ranks have ended" in line for line in site.log)


def test_a_rank_that_dies_ends_the_server_with_its_reason(serve: Serve, tiny_llama_dir: Path) -> None:
    site = serve(tiny_llama_dir)
    site.wait_ready(90)
    lines: list[str] = []
    reader = stream(site, lines)
    (other,) = others(site)
    other.send_signal(signal.SIGKILL)
    assert site.process.wait(60) == 1
    reader.join(60)
    assert '"error"' in "".join(lines), "the answer in flight says that it was cut off"
    assert any("rank 1 of 2 was ended by SIGKILL" in line for line in site.log)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_runs_out_of_memory_ends_the_server_and_says_what_to_lower(
    serve: Serve, tmp_path: Path, process_caps: ProcessCaps, rank: int
) -> None:
    write_tiny_tokenizer(tmp_path)
    model_of("llama", vocab_size=512, intermediate_size=4096).save_pretrained(str(tmp_path))
    site = serve(tmp_path, process_caps.environ)
    site.wait_ready(90)
    (other,) = others(site)
    process_caps.set((site.process.pid, other.pid)[rank], 1 << 20)
    body = {"prompt": "z" * 200, "temperature": 0}  # 200 tokens, 16 KiB each in the middle of a rank's MLP
    answer = httpx.post(f"{site.url}/chat", json=body, timeout=60)
    assert (answer.status_code, site.process.wait(60)) == (503, 1)
    advice = f"rank {rank}: out of memory, which ends the server: lower limits.rows or limits.context_tokens"
    assert any(advice in line for line in site.log)
    assert not other.is_running()


def test_no_rank_outlives_a_server_that_is_killed(serve: Serve, tiny_llama_dir: Path) -> None:
    site = serve(tiny_llama_dir)
    until(lambda: bool(others(site)), 60)  # while they load
    (other,) = others(site)
    site.process.kill()
    until(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, 60)


def test_a_rank_that_cannot_load_ends_the_start_as_it_ended(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    workers = Workers(ModelSource(name="m", path=tmp_path), hardware.detect(), world=2, threads=1)
    with pytest.raises(ConfigError, match="rank 1 of 2 ended with status 2 while it loaded"):
        workers.connect("cpu")
    workers.kill()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"quantization": {"bits": 4}}, "divides whole weights: leave the quantisation out"),
        ({"processes": 3}, "4 attention heads cannot be divided among 3 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_a_process_starts(
    tiny_llama_dir: Path, more: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.serving.engine.parallel.workers.Workers", None)
    model = ModelSource(name="m", path=tiny_llama_dir)
    config = {"model": model, "served_name": "m", "parallel": "tp", "processes": 2} | more
    with pytest.raises(ConfigError, match=reason):
        loading.load(ServeConfig.model_validate(config), oci.Access())
