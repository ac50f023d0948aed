"""Health, metrics and the pages, in this process; /openapi.json against the server as a process."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.anyio

SCRAPER = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
"""What Prometheus says it accepts."""
HEALTH = ["/livez", "/readyz", "/health", "/healthz", "/ping", "/v2/health/live", "/v2/health/ready"]


@pytest.mark.parametrize("path", HEALTH)
async def test_health_is_200_when_ready(open_site: Any, path: str) -> None:
    async with open_site() as site:
        reply = await site.client.get(path)
    assert (reply.status_code, reply.json()) == (200, {"status": "Healthy"})


async def test_only_liveness_is_200_while_loading(open_site: Any) -> None:
    async with open_site(ready=False) as site:
        codes = {path: (await site.client.get(path)).status_code for path in HEALTH}
    assert {path for path, code in codes.items() if code == 200} == {"/livez", "/v2/health/live"}
    assert set(codes.values()) == {200, 503}


async def test_engine_without_progress_is_not_alive(open_site: Any) -> None:
    """Fault 48, second part: a hang is found by progress, and a slow but working engine is left alone."""
    async with open_site(pace_s=0.01, stall_s=1) as site:
        site.engine.hanging = True
        chat = asyncio.create_task(site.chat())
        await asyncio.sleep(0.05)
        assert (await site.client.get("/livez")).status_code == 200
        async with asyncio.timeout(60):
            while (stalled := await site.client.get("/livez")).status_code == 200:
                await asyncio.sleep(0.01)
        assert stalled.status_code == 503
        assert "no token for" in stalled.json()["detail"]
        assert (await site.client.get("/readyz")).status_code == 503
        site.engine.hanging = False
        assert (await chat).status_code == 200
        assert (await site.client.get("/livez")).status_code == 200


async def test_dead_engine_is_not_alive(open_site: Any) -> None:
    async with open_site() as site:
        site.engine.close()
        assert (await site.client.get("/livez")).status_code == 503
        assert (await site.chat()).status_code == 503


async def test_root_says_that_the_server_runs(open_site: Any) -> None:
    async with open_site() as site:
        assert (await site.client.get("/")).json() == {"message": "Server is running"}


def figure(text: str, name: str, **labels: str) -> float:
    """Return one sample of a metrics text."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    raise AssertionError(f"no {name} {labels}")


async def test_metrics_carry_the_names_that_scalers_read_and_move(open_site: Any) -> None:
    """Fault 60."""
    async with open_site(rows=1, queue=4, pace_s=0.02, adapters=["shop"]) as site:
        first = asyncio.create_task(site.chat(adapter="shop"))
        second = asyncio.create_task(site.chat(adapter="shop"))
        async with asyncio.timeout(60):
            while not site.engine.produced or site.engine.stats().waiting != 1:
                await asyncio.sleep(0.001)
            site.engine.hanging = True
            while "\nvllm:prompt_tokens_total{" not in (busy := (await site.client.get("/metrics")).text):
                await asyncio.sleep(0.01)
        site.engine.hanging = False
        await asyncio.gather(first, second)
        await asyncio.sleep(0.01)
        idle = (await site.client.get("/metrics")).text
    assert figure(busy, "vllm:num_requests_running") == 1
    assert figure(busy, "vllm:num_requests_waiting") == 1
    assert figure(busy, "vllm:kv_cache_usage_perc") == 1
    assert figure(busy, "vllm:prompt_tokens_total") > 0
    assert figure(busy, "vllm:cache_config_info", num_gpu_blocks=str(512 // 16), block_size="16") == 1
    assert figure(busy, "kaito_max_concurrent_requests") == 1
    lora = {"running_lora_adapters": "shop", "waiting_lora_adapters": "shop", "max_lora": "1"}
    assert figure(busy, "vllm:lora_requests_info", **lora) > 1e9
    assert figure(idle, "vllm:lora_requests_info", running_lora_adapters="", waiting_lora_adapters="") > 1e9
    assert figure(idle, "vllm:num_requests_running") == 0
    assert figure(idle, "vllm:request_success_total", finished_reason="length") == 2
    assert figure(idle, "vllm:generation_tokens_total") == 32
    assert figure(idle, "vllm:prompt_tokens_total") > 0
    assert figure(idle, "vllm:time_to_first_token_seconds_count") == 2
    assert figure(idle, "vllm:inter_token_latency_seconds_count") == 30
    assert figure(idle, "vllm:e2e_request_latency_seconds_count") == 2
    assert figure(idle, "vllm:request_queue_time_seconds_count") == 2
    assert figure(idle, "vllm:request_queue_time_seconds_sum") > 0.1, "the second waited for the first"
    assert figure(idle, "vllm:prefix_cache_queries_total") == figure(idle, "vllm:prompt_tokens_total")
    assert figure(idle, "vllm:prefix_cache_hits_total") == 2


async def test_metrics_count_refusals_by_status(open_site: Any) -> None:
    async with open_site() as site:
        await site.client.post("/chat", json={})
        text = (await site.client.get("/metrics")).text
    assert figure(text, "runtime:requests_refused_total", status="400") == 1


async def test_clients_of_metrics_that_want_json_get_the_peers_object(open_site: Any) -> None:
    async with open_site(ready=False) as site:
        found = (await site.client.get("/metrics", headers={"Accept": "application/json"})).json()
        scraped = await site.client.get("/metrics", headers={"Accept": SCRAPER})
    assert set(found) == {"gpu_info", "cpu_info"}
    assert scraped.headers["content-type"].startswith("text/plain")


async def test_metrics_are_there_before_the_model(open_site: Any) -> None:
    async with open_site(ready=False) as site:
        assert (await site.client.get("/metrics")).status_code == 200


@pytest.mark.parametrize("path", ["/openapi.json", "/livez", "/chat"])
async def test_options_names_each_method_once(open_site: Any, path: str) -> None:
    async with open_site() as site:
        allowed = (await site.client.options(path)).headers["allow"].split(", ")
    assert sorted(allowed) == (["OPTIONS", "POST"] if path == "/chat" else ["GET", "HEAD", "OPTIONS"])


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_long_path_is_not_repeated(open_site: Any, method: str) -> None:
    async with open_site() as site:
        refused = await site.client.request(method, "/" + "x" * 6000)
    assert refused.status_code == 404
    assert len(refused.content) < 1000


@pytest.mark.long
@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_undescribed_answer(
    start_server: Any, tmp_path: Path
) -> None:
    """Fault 45. schemathesis sends what /openapi.json allows, and what it does not.

    Values are read leniently ("3" is 3) and checked beyond types: those two checks are left out.
    """
    server = start_server(engine={"rows": 8, "queue": 64})
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json"]
    options = ["--checks", checks, "-n", "12", "--seed", "1", "--phases", "fuzzing"]
    ran = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " generated" in ran.stdout
    assert server.running() == 0
