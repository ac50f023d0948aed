"""A server with two replicas: the command's own entry, HTTP, and the ends of its processes."""

import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.conftest import Process, Serve, until

pytestmark = pytest.mark.slow


@pytest.fixture
def serve(serve: Serve) -> Serve:
    """Starts `runtime serve MODEL` with two replicas and waits until its port answers."""

    def start(model: Path, environ: Mapping[str, str] = os.environ) -> Process:
        return serve(model, "--replicas", "2", "--rows", "3", environ={**environ, "OMP_NUM_THREADS": "2"})

    return start


def replicas(site: Process) -> list[psutil.Process]:
    children = psutil.Process(site.process.pid).children()
    return [each for each in children if "runtime.serving.replica" in each.cmdline()]


def metric(site: Process, name: str) -> float:
    (value,) = re.findall(rf"^{name}{{[^}}]*}} (\S+)", site.get("/metrics").text, re.MULTILINE)
    return float(value)


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def stream(site: Process, lines: list[str]) -> threading.Thread:
    """Ask for a long answer in a thread and collect its events; return once it is generated."""
    body = {"prompt": "hi", "max_new_tokens": 1200, "stream": True, "temperature": 0, "ignore_eos": True}

    def read() -> None:
        with httpx.stream("POST", f"{site.url}/chat", json=body, timeout=60) as answer:
            lines.extend(answer.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: site.running() == 1, 60)
    return reader


def test_a_server_answers_from_both_and_ends_with_them(serve: Serve, tiny_llama_dir: Path) -> None:
    site = serve(tiny_llama_dir)
    site.wait_ready(120)
    both = replicas(site)
    assert len(both) == 2
    assert not any(file.type for process in both for file in process.net_connections("inet")), "no port"
    with ThreadPoolExecutor(6) as pool:
        body = {"prompt": "hi", "max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
        answers = list(pool.map(lambda _: httpx.post(f"{site.url}/chat", json=body, timeout=60), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["Result"] for answer in answers}) == 1
    assert metric(site, "runtime:replicas") == 2
    assert metric(site, "kaito_max_concurrent_requests") == 6
    assert metric(site, "vllm:generation_tokens_total") == 240
    lines: list[str] = []
    reader = stream(site, lines)
    assert site.stop(timeout_s=60) == 0
    reader.join(60)
    assert '"finish_reason":"length"' in "".join(lines), "an answer in flight is completed"
    assert all(map(ended, both))


def test_no_replica_outlives_a_server_that_is_killed(serve: Serve, tiny_llama_dir: Path) -> None:
    site = serve(tiny_llama_dir)
    until(lambda: len(replicas(site)) == 2, 60)  # while they load
    both = replicas(site)
    site.process.kill()
    until(lambda: all(map(ended, both)), 60)


def test_the_server_ends_with_a_replica_that_is_killed(serve: Serve, tiny_llama_dir: Path) -> None:
    site = serve(tiny_llama_dir)
    site.wait_ready(120)
    both = replicas(site)
    lines: list[str] = []
    reader = stream(site, lines)
    both[1].kill()
    assert site.process.wait(60) == 1
    reader.join(60)
    assert "the engine has died" in "".join(lines), "whichever replica answered it"
    until(lambda: all(map(ended, both)), 60)
    assert any("was ended by SIGKILL" in line for line in site.log)
