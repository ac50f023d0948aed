"""A job's metrics over HTTP while it runs: GET /metrics for Prometheus, GET /health for probes.

One thread that sleeps until a request comes, and then reads numbers that exist anyway. A port in use is
only a warning: training does not depend on it. Does not know the trainer. Start at `serving`.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime import utilisation
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.progress import JobState

log = logging.getLogger(__name__)

GAUGES = {
    "step": ("tuning_step", "Optimizer steps done"),
    "total_steps": ("tuning_steps_planned", "Optimizer steps of the whole run"),
    "epoch": ("tuning_epoch", "Passes over the training rows done"),
    "loss": ("tuning_loss", "Training loss per trained token, of the last logged step"),
    "held_out_loss": ("tuning_held_out_loss", "Loss per trained token of held-out rows, when last measured"),
    "learning_rate": ("tuning_learning_rate", "Step size of the last logged step"),
    "gradient_norm": ("tuning_gradient_norm", "Norm of the gradient before it is clipped"),
    "tokens_per_s": ("tuning_tokens_per_second", "Tokens a second over all ranks, padding not counted"),
    "trained_share": ("tuning_trained_token_ratio", "Part of the tokens that count in the loss, 0 to 1"),
    "memory_bytes": ("tuning_memory_peak_bytes", "Most memory used so far: of the GPU, else resident"),
    "remaining_s": ("tuning_remaining_seconds", "Expected time to the last step"),
}
COUNTERS = {
    "tokens": ("tuning_tokens", "Tokens trained on by this process's run, padding not counted"),
    "trained_tokens": ("tuning_trained_tokens", "Tokens that counted in the loss"),
}
"""Name in `Throughput.metrics` -> Prometheus name and help."""


def metrics_text(state: Callable[[], JobState]) -> bytes:
    """Return all metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(state))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def health(state: JobState) -> tuple[int, Mapping[str, Any]]:
    """Return the status and body of GET /health: 503 when no step has ended for far too long."""
    status = "Stalled" if state.stalled else "Healthy"
    body = {"status": status, "phase": state.phase, **state.metrics}
    return (503 if state.stalled else 200), body


Address = tuple[str, int]
"""Host and port; port 0 takes a free one."""


def address(job: TuningJob) -> Address | None:
    """Return where `job` serves its metrics, None where it does not."""
    return None if job.metrics_port is None else (job.metrics_host, job.metrics_port)


@contextlib.contextmanager
def serving(
    address: Address | None, state: Callable[[], JobState], *, announced: bool = True
) -> Iterator[int | None]:
    """Within: serve on `address`; not with None, or where it is in use. Yields the port that is served.

    The log says so, unless another process of the job will (`announced`).
    """
    server = _open(address, state, announced=announced) if address else None
    if server is None:
        yield None
        return
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def _open(
    address: Address, state: Callable[[], JobState], *, announced: bool
) -> "ThreadingHTTPServer | None":
    class Handler(_Handler):
        read = staticmethod(state)

    try:
        server = _Server(address, Handler)
    except OSError as error:
        log.log(
            logging.WARNING if announced else logging.DEBUG,
            "no /metrics: cannot listen on %s port %d (%s); --set metrics_port=N takes another, "
            "--set metrics_port=null none",
            *address,
            error.strerror,
        )
        return None
    log.log(
        logging.INFO if announced else logging.DEBUG,
        "metrics on http://%s:%d/metrics",
        address[0],
        server.server_port,
    )
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a client of /metrics disconnected", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    read: Callable[[], JobState]
    timeout = 10  # seconds without input; else a stalled client would hold its thread for ever

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        wants_json = "application/json" in self.headers.get("Accept", "")
        if path == "/metrics" and wants_json:  # as clients of KAITO's own server read it
            self._send(200, json.dumps(utilisation.kaito_metrics()).encode(), "application/json")
        elif path == "/metrics":
            self._send(200, metrics_text(self.read), CONTENT_TYPE_LATEST)
        elif path in ("/health", "/healthz"):
            status, body = health(self.read())
            self._send(status, json.dumps(body).encode(), "application/json")
        else:
            body = {"detail": "Not Found; here are /metrics and /health"}
            self._send(404, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the library's name
        log.debug(format, *arguments)


class _Collector(Collector):
    """Reads the job's state at each scrape."""

    def __init__(self, state: Callable[[], JobState]) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        info = InfoMetricFamily("tuning_job", "The job, its model and what it does now")
        info.add_metric([], {"job": state.job, "model": state.model, "phase": state.phase})
        yield info
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for metric, (name, text) in table.items():
                value = state.metrics.get(metric)
                if value is not None:
                    yield kind(name, text, value=value)
        yield from _gpus()


def _gpus() -> Iterator[Metric]:
    busy = GaugeMetricFamily("tuning_gpu_busy_ratio", "Part of the last second in use", labels=["gpu"])
    used = GaugeMetricFamily("tuning_gpu_memory_used_bytes", "Memory used by all processes", labels=["gpu"])
    total = GaugeMetricFamily("tuning_gpu_memory_bytes", "Memory of the GPU", labels=["gpu"])
    for gpu in utilisation.gpus():
        for family, value in ((busy, gpu.busy), (used, gpu.used_bytes), (total, gpu.total_bytes)):
            if value is not None:
                family.add_metric([gpu.number], value)
    yield from (busy, used, total)
