"""Starts the files that controllers name as controllers start them, without a container."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

FILES = Path(__file__).parents[2] / "docker/workspace"
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
            found = httpx.get(url, timeout=60)
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
