"""GET /metrics and /health of a running job: metrics, formats, and that no client can end training."""

import socket
import time
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.tuning.report import metrics_server
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.progress import JobState, Throughput
from tests.tuning.conftest import Worker, free_port

FREE = ("127.0.0.1", 0)
METRICS = {"step": 3, "total_steps": 9, "loss": 1.5, "held_out_loss": None, "tokens": 700, "memory_bytes": 5}


def state(**given: object) -> JobState:
    values = {"job": "night", "model": "phi", "phase": "train", "stalled": False, "metrics": METRICS}
    return JobState(**{**values, **given})  # type: ignore[arg-type]


def samples(text: str) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_metrics_that_are_known() -> None:
    with metrics_server.serving(FREE, state) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    assert found["tuning_step"] == 3
    assert found["tuning_steps_planned"] == 9
    assert found["tuning_loss"] == 1.5
    assert found["tuning_tokens_total"] == 700
    assert "tuning_held_out_loss" not in found
    assert found["process_resident_memory_bytes"] > 0
    assert 'tuning_job_info{job="night",model="phi",phase="train"} 1.0' in answer.text


def test_every_metric_of_the_throughput_has_a_prometheus_name() -> None:
    assert Throughput().metrics().keys() == metrics_server.GAUGES.keys() | metrics_server.COUNTERS.keys()


def test_health_has_phase_and_metrics_and_is_503_when_stalled() -> None:
    now = {"state": state()}
    with metrics_server.serving(FREE, lambda: now["state"]) as port:
        for path in ("/health", "/healthz"):
            answer = httpx.get(f"http://127.0.0.1:{port}{path}")
            assert answer.status_code == 200
            assert answer.json() == {"status": "Healthy", "phase": "train", **METRICS}
        now["state"] = state(stalled=True)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
        assert httpx.get(f"http://127.0.0.1:{port}/other").status_code == 404


def test_the_address_is_said_once_for_all_processes_of_a_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with metrics_server.serving(FREE, state, announced=False):
        assert not caplog.text
    with metrics_server.serving(FREE, state) as port:
        assert f"metrics on http://127.0.0.1:{port}/metrics" in caplog.text
        with metrics_server.serving(("127.0.0.1", port or 0), state, announced=False):
            assert "cannot listen" not in caplog.text


def test_clients_that_accept_json_get_kaitos_object() -> None:
    with metrics_server.serving(FREE, state) as port:
        found = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/json"}).json()
    assert set(found) == {"gpu_info", "cpu_info"}
    if found["gpu_info"] is None:
        memory = found["cpu_info"]["memory"]
        assert 0 < float(memory["used"].removesuffix(" GB")) < float(memory["total"].removesuffix(" GB"))


def test_port_in_use_is_a_warning_and_null_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with metrics_server.serving(FREE, state) as port:
        with metrics_server.serving(("127.0.0.1", port or 0), state) as second:
            assert second is None
        assert f"cannot listen on 127.0.0.1 port {port}" in caplog.text
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    with metrics_server.serving(None, state) as none:
        assert none is None
    with metrics_server.serving(("127.0.0.1", port or 0), state) as again:  # the port is free at once
        assert again == port


def test_silent_client_does_not_block_others() -> None:
    with metrics_server.serving(FREE, state) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET /met")
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200


@pytest.mark.slow
def test_job_serves_its_steps_while_it_trains(make_job: Callable[..., TuningJob]) -> None:
    port = free_port()
    worker = Worker(make_job(training={"max_steps": 4000, "logging_steps": 100}, metrics_port=port))
    base = f"http://127.0.0.1:{port}"
    seen: list[dict[str, object]] = []
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (seen and seen[-1].get("step", 0)):
        assert worker.process.poll() is None, worker.output()
        try:
            seen.append(httpx.get(f"{base}/health", timeout=60).json())
        except httpx.TransportError:
            time.sleep(0.05)
    found = samples(httpx.get(f"{base}/metrics").text)
    worker.process.kill()
    worker.wait()
    assert {"start", "train"} <= {str(answer["phase"]) for answer in seen} | {"start"}
    assert found["tuning_steps_planned"] == 4000
    assert 0 < found["tuning_step"] < 4000
    assert found["tuning_held_out_loss"] > 0
    assert found["tuning_tokens_per_second"] > 0
