"""The startup probe of controllers' vLLM pods, against the real server over an engine without a model."""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.pod import benchmark
from runtime.pod.benchmark import Counters, Load
from tests.pod.processes import answer, free_port, started

ROOT = Path(__file__).parents[2]
TAIL_LINES = 500


def controller_reads(log: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Parse a pod's log as KAITO's pkg/workspace/controllers/benchmark.go does; return config and result.

    Of the last 500 lines, the last with each tag; what follows the tag, less the word up to the first
    space, is JSON. Raises where the controller reports that the benchmark failed.
    """
    found: dict[str, str] = {}
    for line in log.split("\n")[-TAIL_LINES:]:
        for tag in ("KAITO_BENCHMARK_RESULT", "KAITO_BENCHMARK_CONFIG"):
            _, at, rest = line.partition(tag)
            _, space, payload = rest.strip().partition(" ")
            if at and space and payload.strip():
                found[tag] = payload.strip()
                break
    assert "KAITO_BENCHMARK_RESULT" in found, "no KAITO_BENCHMARK_RESULT line found in pod logs"
    result = json.loads(found["KAITO_BENCHMARK_RESULT"])
    assert result["vllm_total_tpm"] > 0, "benchmark failed"
    config = found.get("KAITO_BENCHMARK_CONFIG")
    return None if config is None else json.loads(config), result


@contextmanager
def server(tmp_path: Path, config: dict[str, Any], engine: dict[str, Any]) -> Iterator[str]:
    port, log = free_port(), tmp_path / "server.log"
    options = json.dumps({"config": {"port": port, **config}, "engine": engine})
    command = [sys.executable, "-m", "tests.serving.fake_server", options]
    with started(command, log, PYTHONPATH=str(ROOT)) as process:
        base = f"http://127.0.0.1:{port}"
        answer(f"{base}/health", process, log)
        yield base


def run(base: str, output: Path, **environ: str) -> int:
    return benchmark.run({"BENCHMARK_DURATION_SEC": "1", **environ}, base=base, output=output)


def metric(base: str, name: str) -> float:
    return float(re.search(rf"(?m)^{name}(?:{{.*}})? (\S+)", httpx.get(f"{base}/metrics").text)[1])  # type: ignore[index]


def test_result_has_the_form_that_the_controller_parses(tmp_path: Path) -> None:
    output = tmp_path / "log"
    engine = {"rows": 3, "queue": 0, "pace_s": 0.002, "context_tokens": 4096}
    with server(tmp_path, {}, engine) as base:
        began = time.monotonic()
        assert run(base, output) == 0
        minutes = (time.monotonic() - began) / 60
        config, result = controller_reads(output.read_text())
        counted = metric(base, "vllm:prompt_tokens_total") + metric(base, "vllm:generation_tokens_total")
        assert metric(base, "vllm:num_requests_running") == 0, "it drains before it reports"
    assert config == {"duration_sec": 1, "input_tokens": 2048, "output_tokens": 256, "max_concurrency": 3}
    assert all(isinstance(value, int) for value in config.values())
    assert (
        0.5 * counted / minutes < result["vllm_total_tpm"] < 1.5 * counted * 60
    )  # it took a second at least
    assert 0.1 < result["ttft_avg_ms"] < 60_000 * minutes
    assert 2 < result["tpot_avg_ms"] < 60_000 * minutes / 255
    for line in output.read_text().splitlines():
        assert re.fullmatch(r"KAITO_BENCHMARK_(CONFIG|RESULT) \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ {\S+}", line)


def test_a_short_context_shortens_prompt_and_answer(tmp_path: Path) -> None:
    output = tmp_path / "log"
    with server(tmp_path, {}, {"rows": 2, "queue": 0, "pace_s": 0.002, "context_tokens": 512}) as base:
        assert run(base, output) == 0
    config, _ = controller_reads(output.read_text())
    assert config == {"duration_sec": 1, "input_tokens": 256, "output_tokens": 256, "max_concurrency": 2}


def test_not_ready_fails_without_a_line(tmp_path: Path) -> None:
    assert run(f"http://127.0.0.1:{free_port()}", tmp_path / "log") == 1
    assert not (tmp_path / "log").exists()


def test_further_pods_of_several_pass_at_once(tmp_path: Path) -> None:
    assert run("http://127.0.0.1:9", tmp_path / "log", POD_INDEX="1") == 0
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("config", "engine", "environ"),
    [
        ({"api_key": "secret"}, {}, {}),
        ({}, {"pace_s": 2}, {}),
        ({}, {}, {"BENCHMARK_DURATION_SEC": "0"}),
    ],
    ids=["needs a key", "no token in time", "wrong duration"],
)
def test_a_failed_benchmark_reports_minus_one_and_fails_the_probe(
    config: dict[str, Any], engine: dict[str, Any], environ: dict[str, str], tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(benchmark, "MOST_S", 0.5)
    output = tmp_path / "log"
    with server(tmp_path, config, {"pace_s": 0.002, **engine}) as base:
        assert run(base, output, **environ) == 1
    (line,) = output.read_text().splitlines()
    assert line.startswith("KAITO_BENCHMARK_RESULT ")
    assert json.loads(line.split(" ", 2)[2])["vllm_total_tpm"] == -1
    assert "benchmark: " in caplog.text
    with pytest.raises(AssertionError, match="benchmark failed"):
        controller_reads(output.read_text())


def test_a_slow_server_is_loaded_until_it_has_generated_something(tmp_path: Path) -> None:
    output = tmp_path / "log"
    with server(tmp_path, {}, {"rows": 2, "queue": 0, "pace_s": 1.5}) as base:
        assert run(base, output) == 0
    assert controller_reads(output.read_text())[1]["ttft_avg_ms"] > 1200


def test_a_server_too_slow_for_all_prompts_at_once_is_measured_in_the_time_given(tmp_path: Path) -> None:
    """Its 64 prompts take 64 s, and those that begin together end together."""
    output = tmp_path / "log"
    with server(tmp_path, {}, {"rows": 64, "queue": 0, "prompt_s": 1, "context_tokens": 4096}) as base:
        began = time.monotonic()
        assert run(base, output, BENCHMARK_DURATION_SEC="3") == 0
        assert time.monotonic() - began < 40
    config, result = controller_reads(output.read_text())
    assert config is not None
    assert config["max_concurrency"] == 64
    assert result["vllm_total_tpm"] > 0.9 * 20 * 2048, "the prompts that were answered by then, at least one"


def test_the_servers_key_is_taken_from_the_environment(tmp_path: Path) -> None:
    with server(tmp_path, {"api_key": "secret"}, {"pace_s": 0.002}) as base:
        assert run(base, tmp_path / "log", VLLM_API_KEY="secret") == 0


def test_a_result_that_nobody_can_read_fails_the_probe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with server(tmp_path, {}, {"pace_s": 0.002}) as base:
        assert run(base, tmp_path / "missing/log") == 1
    assert "the controller cannot read the result" in caplog.text


def test_the_last_result_counts(tmp_path: Path) -> None:
    """A probe that failed is called again; its lines stay in the log."""
    output = tmp_path / "log"
    output.write_text('KAITO_BENCHMARK_RESULT 2026-01-01T00:00:00Z {"vllm_total_tpm":-1.0}\n')
    with server(tmp_path, {}, {"pace_s": 0.002}) as base:
        assert run(base, output) == 0
    assert controller_reads(output.read_text())[1]["vllm_total_tpm"] > 0


@pytest.mark.parametrize(
    ("blocks", "at_once", "concurrency"),
    [(1000, 32, 6), (10000, 32, 32), (10, 32, 1)],
    ids=["as many as the blocks hold", "no more than are answered at once", "at least one"],
)
def test_concurrency_follows_the_cache(blocks: int, at_once: int, concurrency: int) -> None:
    text = (
        f'vllm:cache_config_info{{num_gpu_blocks="{blocks}",block_size="16"}} 1.0\n'
        f"kaito_max_concurrent_requests {at_once}\n"
    )
    load = benchmark.load_for(text, context_tokens=8192, duration_sec=60)
    assert load == Load(60, 2048, 256, concurrency)


def test_summary_is_the_difference_of_the_counters_over_the_time() -> None:
    before, after = (Counters(*figures) for figures in ([100, 10, 1, 2, 3, 8], [400, 110, 3, 6, 8, 108]))
    assert benchmark.summary(before, after, 2.0) == {
        "vllm_total_tpm": 9000.0, "ttft_avg_ms": 500.0, "tpot_avg_ms": 50.0
    }  # fmt: skip
