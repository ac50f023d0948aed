"""Health, key, metrics and the gates, in this process."""

import asyncio
import base64
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from runtime.serving.http.middleware import OPEN_PATHS
from runtime.serving.settings import Limits

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
    async with open_site(pace_s=0.01) as site:
        site.engine.hanging = True
        chat = asyncio.create_task(site.chat())
        await asyncio.sleep(0.05)
        assert (await site.client.get("/livez")).status_code == 200
        await asyncio.sleep(0.4)
        stalled = await site.client.get("/livez")
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


def operations(app: Any) -> list[tuple[str, str]]:
    """Return every (method, path) of an app, parameters filled in."""
    found = []
    pending = list(app.routes)
    while pending:
        route = pending.pop()
        if isinstance(route, Route) or hasattr(route, "methods"):
            found += [(method, re.sub(r"\{.*?\}", "x", route.path)) for method in route.methods or ()]
        pending += getattr(getattr(route, "original_router", None), "routes", [])
    return found


def basic(password: bytes) -> str:
    """Return the header a browser sends for a password."""
    return "Basic " + base64.b64encode(b"anyone:" + password).decode()


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer", basic(b"wrong"), "Basic !"])
async def test_every_route_but_health_and_metrics_demands_the_key(open_site: Any, key: str | None) -> None:
    """Fault 54, by enumeration of the app's routes."""
    headers = {"Authorization": key} if key else {}
    async with open_site(api_key="sesame") as site:
        listed = operations(site.app)
        assert {"/chat", "/v1/chat/completions", "/", "/openapi.json"} <= {path for _, path in listed}
        for method, path in [*listed, ("GET", "/nowhere")]:
            reply = await site.client.request(method, path, headers=headers)
            if path in OPEN_PATHS:
                assert reply.status_code == 200, path
            else:
                assert reply.status_code == 401, path
                assert reply.headers["www-authenticate"] == "Bearer"
    assert {*HEALTH, "/metrics"} == OPEN_PATHS


async def test_right_key_opens_as_bearer_and_as_a_browsers_password(open_site: Any) -> None:
    async with open_site(api_key="sesame") as site:
        for key in ("Bearer sesame", "bearer sesame", basic(b"sesame")):
            reply = await site.client.get("/v1/models", headers={"Authorization": key})
            assert reply.status_code == 200
        page = await site.client.get("/", headers={"Accept": "text/html"})
        assert page.headers["www-authenticate"].startswith("Basic ")
        forged = {"Authorization": basic(b"sesame"), "Sec-Fetch-Site": "cross-site"}
        assert (await site.client.get("/v1/models", headers=forged)).status_code == 401


async def test_request_id_is_echoed_or_made(open_site: Any) -> None:
    async with open_site() as site:
        given = await site.client.get("/livez", headers={"X-Request-Id": "abc-1"})
        made = await site.client.get("/livez")
        forged = await site.client.get("/livez", headers={"X-Request-Id": "a b"})
    assert given.headers["x-request-id"] == "abc-1"
    assert len(made.headers["x-request-id"]) == 16
    assert forged.headers["x-request-id"] != "a b"


async def test_one_request_id_twice_at_the_same_time_is_two_requests(open_site: Any) -> None:
    async with open_site(pace_s=0.01) as site:
        post = site.client.post
        ask = {"json": {"prompt": "hi"}, "headers": {"X-Request-Id": "same"}}
        replies = await asyncio.gather(post("/chat", **ask), post("/chat", **ask))
    assert [reply.status_code for reply in replies] == [200, 200]


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
        await asyncio.sleep(0.15)
        busy = (await site.client.get("/metrics")).text
        await asyncio.gather(first, second)
        await asyncio.sleep(0.01)
        idle = (await site.client.get("/metrics")).text
    assert figure(busy, "vllm:num_requests_running") == 1
    assert figure(busy, "vllm:num_requests_waiting") == 1
    assert figure(busy, "vllm:kv_cache_usage_perc") == 1
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


async def test_body_over_the_limit_is_413(open_site: Any) -> None:
    async with open_site(limits=Limits(body_bytes=2048)) as site:
        reply = await site.chat("x" * 3000)
        assert reply.status_code == 413
        assert "2048 bytes" in reply.json()["detail"]
        assert (await site.chat()).status_code == 200
