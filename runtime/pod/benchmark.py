"""The startup probe of controllers' vLLM pods: how many tokens a minute this server handles.

`docker/workspace/vllm/benchmark_entrypoint.py` calls it each probe period. It fails until the server is
ready, then loads it once and writes two lines to the container's output, which the controller reads from
the pod's log and without which the Workspace does not become Ready. A client of the server; it does not
know the engine. Start at `run`.
"""

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from runtime import ports
from runtime.errors import ConfigError, one_line

log = logging.getLogger(__name__)

INPUT_TOKENS, OUTPUT_TOKENS = 2048, 256
DURATION_SEC = 60
DURATION_VARIABLE = "BENCHMARK_DURATION_SEC"
MOST_S = 420.0
"""Longest load, where even the first token takes longer than it should last."""
POLL_S = 0.2
"""How often the server's counters are read."""
DRAIN_S = 120.0
REQUEST_S = 600.0
"""The kubelet ends the probe after this time, whatever it does."""
OUTPUT = Path("/proc/1/fd/1")
"""The container's output: what a probe itself prints is not part of the pod's log."""
VOCABULARY = "The quick brown fox jumps over the lazy dog; 0123456789 apples, please? Count: one two three."


class BenchmarkError(Exception):
    """The server could not be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load, under the names that the controller copies into the Workspace's status."""

    duration_sec: int
    input_tokens: int
    output_tokens: int
    max_concurrency: int


@dataclass(frozen=True, slots=True)
class Counters:
    """What the server's metrics have counted so far."""

    tokens: float
    """Prompt and generated tokens."""
    generated: float
    first_s: float
    """Sum over all answers of the time to the first token; `answers` of them."""
    answers: float
    between_s: float
    """Sum over all further tokens of the time since the one before; `further` of them."""
    further: float


def run(environ: Mapping[str, str], *, base: str | None = None, output: Path = OUTPUT) -> int:
    """Measure the server at `base` and report on `output`; return the probe's exit status.

    0 where it is measured, or this pod is not the first of several; 1 while it is not ready, and where
    the measurement failed or nobody would read it.
    """
    base = base or f"http://127.0.0.1:{ports.CONTROLLER}"
    if environ.get("POD_INDEX", "0") != "0":
        return 0
    if not _ready(base):
        return 1
    load, figures, status = None, {"vllm_total_tpm": -1.0, "ttft_avg_ms": -1.0, "tpot_avg_ms": -1.0}, 1
    try:
        load, figures = asyncio.run(_measure(base, environ))
        status = 0
    except (BenchmarkError, ConfigError, httpx.HTTPError) as error:
        log.warning("benchmark: %s", error or type(error).__name__)
    lines = [] if load is None else [_line("KAITO_BENCHMARK_CONFIG", asdict(load))]
    try:
        with output.open("a", encoding="utf-8") as stream:
            stream.write("".join([*lines, _line("KAITO_BENCHMARK_RESULT", figures)]))
    except OSError as error:
        log.warning("benchmark: %s: %s; the controller cannot read the result", output, error.strerror)
        return 1
    return status


def load_for(text: str, *, context_tokens: int, duration_sec: int) -> Load:
    """Return the load that fills the cache which the server's metrics `text` describe.

    As many requests at a time as its blocks hold, and no more than it answers at once; a context below
    2,304 tokens shortens prompt and answer.
    """
    blocks, block_tokens, at_once = 0, 0, 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                blocks, block_tokens = int(sample.labels["num_gpu_blocks"]), int(sample.labels["block_size"])
            if sample.name == "kaito_max_concurrent_requests":
                at_once += int(sample.value)
    if not blocks or not block_tokens or not at_once:
        raise BenchmarkError("no vllm:cache_config_info or kaito_max_concurrent_requests in /metrics")
    output_tokens = min(OUTPUT_TOKENS, context_tokens // 2)
    input_tokens = min(INPUT_TOKENS, context_tokens - output_tokens)
    fit = blocks // math.ceil((input_tokens + output_tokens) / block_tokens)
    return Load(duration_sec, input_tokens, output_tokens, max(1, min(fit, at_once)))


def summary(before: Counters, after: Counters, seconds: float) -> dict[str, float]:
    """Return tokens per minute, and the mean times in ms to the first and each further token."""
    if after.generated <= before.generated:
        raise BenchmarkError(f"no token was generated in {seconds:.0f} s")
    answers, further = after.answers - before.answers, after.further - before.further
    return {
        "vllm_total_tpm": round(60 * (after.tokens - before.tokens) / seconds, 2),
        "ttft_avg_ms": round(1000 * (after.first_s - before.first_s) / max(answers, 1), 2),
        "tpot_avg_ms": round(1000 * (after.between_s - before.between_s) / max(further, 1), 2),
    }


def _line(tag: str, figures: Mapping[str, float]) -> str:
    """Return a log line as the controller parses it: the tag, a time without spaces, JSON."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"{tag} {stamp} {json.dumps(figures, separators=(',', ':'))}\n"


def _ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


async def _measure(base: str, environ: Mapping[str, str]) -> tuple[Load, dict[str, float]]:
    written = environ.get(DURATION_VARIABLE) or str(DURATION_SEC)
    if not written.isdecimal() or not 1 <= int(written) <= DURATION_SEC:
        raise ConfigError(f"{DURATION_VARIABLE} is {written!r}, expected 1 to {DURATION_SEC} seconds")
    key = environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=30, limits=limits) as client:
        counted = (
            await _post(client, "/tokenize", {"prompt": VOCABULARY, "add_special_tokens": False})
        ).json()
        load = load_for(
            (await client.get("/metrics")).text,
            context_tokens=counted["max_model_len"],
            duration_sec=int(written),
        )
        before, began = await _counters(client), time.monotonic()
        await _drive(client, load, counted["tokens"])
        after, ended = await _counters(client), time.monotonic()
        figures = summary(before, after, ended - began)
        await _drained(client)
    return load, figures


async def _drive(client: httpx.AsyncClient, load: Load, token_ids: list[int]) -> None:
    """Keep up to `load.max_concurrency` requests in flight for `load.duration_sec`, then leave them.

    They begin as answers do: one, then twice as many as have begun to be answered. All at once their prompts
    would take turns, and on a slow machine none would be answered in time. Longer where no token was
    generated by then. Raises BenchmarkError at the first request that is refused for another reason than a
    full queue.
    """
    began, before = time.monotonic(), await _counters(client)
    tasks: set[asyncio.Task[None]] = set()
    failed: set[asyncio.Task[None]] = set()
    answers = generated = 0.0
    while not failed and not _over(time.monotonic() - began, load, generated=generated):
        while len(tasks) < min(load.max_concurrency, 1 + 2 * answers):
            tasks.add(asyncio.create_task(_requests(client, load, token_ids)))
        failed, _ = await asyncio.wait(tasks, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
        now = await _counters(client)
        answers, generated = now.answers - before.answers, now.generated - before.generated
    for task in tasks - failed:
        task.cancel()
    await asyncio.gather(*(tasks - failed), return_exceptions=True)
    for task in failed:
        task.result()


def _over(seconds: float, load: Load, *, generated: float) -> bool:
    """Whether a load that began `seconds` ago, and of which so many tokens came, has lasted long enough."""
    return seconds >= (load.duration_sec if generated else MOST_S)


async def _requests(client: httpx.AsyncClient, load: Load, token_ids: list[int]) -> None:
    """Send one request after another, each with a prompt of its own: nothing of it is in a cache."""
    while True:
        prompt = random.choices(token_ids, k=load.input_tokens)  # noqa: S311 - a load, no secret
        body = {"prompt": prompt, "max_tokens": load.output_tokens, "ignore_eos": True}
        if (await _post(client, "/v1/completions", body)).status_code == 429:
            await asyncio.sleep(0.5)


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    response = await client.post(path, json=body, timeout=REQUEST_S)
    if response.is_error and response.status_code != 429:
        raise BenchmarkError(f"{path} answered {response.status_code}: {one_line(response.text)}")
    return response


async def _counters(client: httpx.AsyncClient) -> Counters:
    text = (await client.get("/metrics")).text
    generated = _total(text, "vllm:generation_tokens_total")
    return Counters(
        tokens=generated + _total(text, "vllm:prompt_tokens_total"),
        generated=generated,
        first_s=_total(text, "vllm:time_to_first_token_seconds_sum"),
        answers=_total(text, "vllm:time_to_first_token_seconds_count"),
        between_s=_total(text, "vllm:inter_token_latency_seconds_sum"),
        further=_total(text, "vllm:inter_token_latency_seconds_count"),
    )


async def _drained(client: httpx.AsyncClient) -> None:
    """Wait until nothing is generated any more: readiness then begins with an idle server."""
    deadline = time.monotonic() + DRAIN_S
    while _total((await client.get("/metrics")).text, "vllm:num_requests_running"):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"requests still run {DRAIN_S:.0f} s after the load ended")
        await asyncio.sleep(POLL_S)


def _total(text: str, name: str) -> float:
    """Return the sum of a metric's samples: one for each model or engine process."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name)
