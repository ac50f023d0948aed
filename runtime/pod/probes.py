"""Exec probes of vLLM pods: benchmark_entrypoint.py and multi-node-health-check.py.

The benchmark is a startup probe: it fails until the server is ready, then measures it once and writes two
lines, which the controller reads, to the container's own output. A client of the server, it does not know
the engine. Start at `benchmark`.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from runtime import net, ports
from runtime.pod import flags

log = logging.getLogger(__name__)

STREAMS = 4
NEW_TOKENS = 32
PROMPT = "Count from one to one hundred in words."
DEADLINE_S = 60.0
"""Longest silence of one stream; the controller allows the probe ten minutes."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Times and token counts of one streamed answer."""

    first_s: float
    total_s: float
    tokens: int
    prompt_tokens: int


def benchmark(
    base: str = f"http://127.0.0.1:{ports.CONTROLLER}", *, output: Path = Path("/proc/1/fd/1")
) -> int:
    """Return 1 while the server at `base` is not ready; else measure it, report on `output` and return 0."""
    if not _ready(base):
        return 1
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = list(pool.map(lambda _: _measure(base), range(STREAMS)))
    except (httpx.HTTPError, ValueError) as error:
        log.warning("benchmark: %s", error)
        return 1
    settings = {"num_prompts": STREAMS, "max_tokens": NEW_TOKENS}
    result = summary(streams, time.monotonic() - began)
    report = f"KAITO_BENCHMARK_CONFIG {json.dumps(settings)}\nKAITO_BENCHMARK_RESULT {json.dumps(result)}\n"
    _write_report(output, report)
    return 0


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, float]:
    """Return tokens per minute of all streams, and the mean times to the first and each further token."""
    tokens = sum(stream.tokens + stream.prompt_tokens for stream in streams)
    further = [(s.total_s - s.first_s) / (s.tokens - 1) for s in streams if s.tokens > 1]
    return {
        "vllm_total_tpm": round(60 * tokens / seconds, 1),
        "ttft_avg_ms": round(1000 * sum(s.first_s for s in streams) / len(streams), 1),
        "tpot_avg_ms": round(1000 * sum(further) / len(further), 1) if further else 0.0,
    }


def node_health(arguments: Sequence[str]) -> int:
    """Run `liveness|readiness --leader-address=… [--vllm-port=…]`; return 0 where the server passes."""
    options = flags.read(arguments)
    host, port = options.get("leader_address") or "127.0.0.1", options.get("vllm_port") or ports.CONTROLLER
    path = "readyz" if "readiness" in arguments else "livez"
    return 0 if _ok(f"http://{host}:{port}/{path}") else 1


def _ready(base: str) -> bool:
    return _ok(f"{base}/readyz")


def _ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def _measure(base: str) -> Stream:
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": NEW_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, usage = time.monotonic(), None, {"completion_tokens": 0, "prompt_tokens": 0}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=DEADLINE_S) as response:
        response.read() if response.is_error else None
        response.raise_for_status()
        for event in _events(response):
            first = first or time.monotonic()
            usage = event.get("usage") or usage
    ended = time.monotonic()
    return Stream((first or ended) - began, ended - began, usage["completion_tokens"], usage["prompt_tokens"])


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for data in net.events(response.iter_bytes()):
        if data != "[DONE]":
            yield json.loads(data)


def _write_report(output: Path, text: str) -> None:
    """Write to the container's output, which becomes the pod's log: a probe's own output is discarded."""
    try:
        with output.open("w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        log.warning("benchmark: %s: %s", output, error.strerror)
