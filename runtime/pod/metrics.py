"""`metrics_server.py`: GET /metrics of a tuning pod, in the JSON that KAITO's own server answers.

Stands beside the training process and imports none of its libraries, so that it costs a few megabytes.
Does not know the job. Start at `main`.
"""

import json
import logging
import os
import signal
import socket
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

import pynvml

from runtime import logs
from runtime.pod.inference import port

log = logging.getLogger(__name__)

GIB = 2**30


class _Answers(BaseHTTPRequestHandler):
    """One connection."""

    timeout = 10  # seconds of silence; without it a stalled client would hold its thread for ever

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, figures())
        elif path in ("/health", "/healthz"):
            self._answer(200, {"status": "Healthy"})
        else:
            self._answer(404, {"detail": "Not Found"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the library's name
        log.debug(format, *arguments)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET


def main(environ: Mapping[str, str]) -> int:
    """Answer until SIGTERM; return at once, and well, where the port is taken: training must not suffer."""
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")
    place = port({}, environ)
    try:
        server = _Server(("0.0.0.0", place), _Answers)  # noqa: S104 - a pod must be reachable
    except OSError as error:
        log.warning("no metrics: port %d cannot be had (%s)", place, error.strerror)
        return 0

    def stop(number: int, _: FrameType | None) -> None:
        Thread(target=server.shutdown).start()  # waits for the loop that this signal interrupts

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("metrics on port %d", place)
    with server:
        server.serve_forever()
    return 0


def figures() -> dict[str, Any]:
    """Return the GPUs' load and memory, or the host's where there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {"gpu_info": None, "cpu_info": _cpu()}
    try:
        return {"gpu_info": [_gpu(n) for n in range(pynvml.nvmlDeviceGetCount())], "cpu_info": None}
    finally:
        pynvml.nvmlShutdown()


def _gpu(number: int) -> dict[str, Any]:
    device = pynvml.nvmlDeviceGetHandleByIndex(number)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    load = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
    return {
        "id": str(number),
        "name": str(pynvml.nvmlDeviceGetName(device)),
        "load": f"{load:.2f}%",
        "temperature": f"{pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU)} C",
        "memory": _memory(memory.used, memory.total),
    }


def _cpu() -> dict[str, Any]:
    cores = os.cpu_count() or 1
    memory = {
        line.partition(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    }
    used = memory["MemTotal"] - memory.get("MemAvailable", memory["MemFree"])
    return {
        "load_percentage": round(min(100.0, 100 * os.getloadavg()[0] / cores), 1),
        "physical_cores": _physical_cores() or cores,
        "total_cores": cores,
        "memory": _memory(used, memory["MemTotal"]),
    }


def _physical_cores() -> int:
    found = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/core_cpus_list")
    return len({path.read_text(encoding="utf-8") for path in found})


def _memory(used: int, total: int) -> dict[str, str]:
    return {"used": f"{used / GIB:.2f} GB", "total": f"{total / GIB:.2f} GB"}
