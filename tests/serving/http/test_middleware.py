"""API key, request ids and limits on bodies, in this process."""

import asyncio
import base64
import gzip
import re
from typing import Any

import openai
import pytest
from starlette.routing import Route

from runtime.serving.http.middleware import ADMIN_PATHS, DESCRIPTION_PATHS, OPEN_PATHS
from runtime.serving.keys import KeyEntry, KeyLimits, digest
from runtime.serving.settings import Limits
from tests.serving.http.test_app import HEALTH

pytestmark = pytest.mark.anyio


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
            if path in OPEN_PATHS | DESCRIPTION_PATHS:
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


async def test_anthropics_header_carries_the_key_too(open_site: Any) -> None:
    async with open_site(api_key="sesame") as site:
        assert (await site.client.get("/v1/models", headers={"x-api-key": "sesame"})).status_code == 200
        assert (await site.client.get("/v1/models", headers={"x-api-key": "x"})).status_code == 401


def entry(name: str, **limits: Any) -> KeyEntry:
    """A key that is its name."""
    return KeyEntry(name, digest(name), KeyLimits(**limits))


def bearing(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_only_an_administrators_key_changes_what_all_see(open_site: Any) -> None:
    async with open_site(keys=(entry("ops", admin=True), entry("team"))) as site:
        for path in ADMIN_PATHS:
            assert ("POST", path) in operations(site.app)
            denied = await site.client.post(path, headers=bearing("team"), json={})
            assert (denied.status_code, denied.json()["error"]["code"]) == (403, "admin_key_required")
            assert (await site.client.post(path, headers=bearing("ops"), json={})).status_code == 400
            for spelled in (path.replace("/v1", "/v1/"), path + "/", path + "%0A", path.replace("_", "%5F")):
                denied = await site.client.post(spelled, headers=bearing("team"), json={})
                assert denied.status_code == 403, spelled
        assert (await site.client.get("/v1/models", headers=bearing("team"))).status_code == 200
    async with open_site(api_key="sesame") as site:  # one key alone may do all
        for path in ADMIN_PATHS:
            assert (await site.client.post(path, headers=bearing("sesame"), json={})).status_code == 400


async def test_each_key_has_requests_of_its_own(open_site: Any) -> None:
    keys = (entry("a", requests_per_minute=1), entry("b", requests_per_minute=1), entry("c"))
    async with open_site(keys=keys) as site:

        async def status(key: str) -> int:
            reply = await site.client.post("/chat", headers=bearing(key), json={"prompt": "hi"})
            return int(reply.status_code)

        assert [await status(key) for key in "aabbccc"] == [200, 429, 200, 429, 200, 200, 200]
        assert (await site.client.get("/v1/models", headers=bearing("a"))).status_code == 200
        text = site.metrics.text().decode()
    assert 'runtime:key_requests_total{key="a"} 1.0' in text
    assert 'runtime:key_requests_total{key="c"} 3.0' in text
    assert 'runtime:key_refused_total{key="b",limit="requests"} 1.0' in text


async def test_openais_client_reads_when_to_come_again(open_site: Any) -> None:
    keys = (entry("key", requests_per_minute=2),)
    async with open_site(keys=keys) as site:
        client = openai.AsyncOpenAI(
            api_key="key", base_url="http://test/v1", http_client=site.client, max_retries=0
        )
        ask = client.chat.completions.with_raw_response.create
        message: Any = [{"role": "user", "content": "hi"}]
        headers = (await ask(model="base", messages=message)).headers
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "1"
        await ask(model="base", messages=message)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(model="base", messages=message)
        assert refused.value.code == "rate_limit_exceeded"
        headers = refused.value.response.headers
        wait_s = client._parse_retry_after_header(headers)
        assert wait_s is not None
        assert 0 < wait_s <= 30
        assert wait_s <= int(headers["retry-after"]) <= 30
        assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_tokens_that_were_not_used_come_back(open_site: Any) -> None:
    async with open_site(keys=(entry("a", tokens_per_minute=1000),), context_tokens=4096) as site:

        async def ask(new_tokens: int, **more: Any) -> Any:
            body = {"prompt": "hi", "max_new_tokens": new_tokens, "raw": True, **more}
            return await site.client.post("/chat", headers=bearing("a"), json=body)

        first = await ask(900, stop=["h"])
        assert first.status_code == 200
        left = int(first.headers["x-ratelimit-remaining-tokens"])
        assert left >= 95, "the answer was not complete when the headers were sent"
        second = await ask(10)
        assert int(second.headers["x-ratelimit-remaining-tokens"]) > 900
        await ask(600)  # which is half a minute's worth: more than passes before the next
        refused = await ask(2000)
        assert refused.status_code == 429
        assert "limited to 1000 tokens per minute" in refused.json()["detail"]
        text = site.metrics.text().decode()
    assert 'runtime:key_refused_total{key="a",limit="tokens"} 1.0' in text
    assert re.search(r'runtime:key_tokens_total\{key="a",kind="prompt"\} [1-9]', text)


async def test_a_request_that_the_full_queue_refuses_uses_no_tokens(open_site: Any) -> None:
    keys = (entry("a", tokens_per_minute=10_000), entry("b"))
    async with open_site(keys=keys, rows=1, queue=0, pace_s=0.02) as site:
        post = site.client.post
        slow = asyncio.create_task(post("/chat", headers=bearing("b"), json={"prompt": "hi"}))
        while not site.engine.stats().running:
            await asyncio.sleep(0.001)
        refused = await post("/chat", headers=bearing("a"), json={"prompt": "hi"})
        assert refused.status_code == 429
        assert "requests are waiting already" in refused.json()["detail"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "10000"
        await slow


async def test_requests_in_flight_of_a_removed_key_end_well(open_site: Any) -> None:
    async with open_site(keys=(entry("a", tokens_per_minute=10_000),), pace_s=0.005) as site:
        ring = site.app.user_middleware[0].kwargs["callers"].keys
        post = site.client.post
        slow = asyncio.create_task(post("/chat", headers=bearing("a"), json={"prompt": "hi"}))
        while not site.engine.stats().running:
            await asyncio.sleep(0.001)
        ring.replace((entry("b"),))
        assert (await post("/chat", headers=bearing("a"), json={"prompt": "hi"})).status_code == 401
        assert (await slow).status_code == 200
        assert 'key="a"' not in site.metrics.text().decode()


async def test_requests_wait_by_the_name_of_their_key(open_site: Any) -> None:
    async with open_site(keys=(entry("a"), entry("b"))) as site:
        for key in "ab":
            await site.client.post("/chat", headers=bearing(key), json={"prompt": "hi"})
        assert [request.client for request in site.engine.requests] == ["a", "b"]


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
        request = {"json": {"prompt": "hi"}, "headers": {"X-Request-Id": "same"}}
        replies = await asyncio.gather(post("/chat", **request), post("/chat", **request))
    assert [reply.status_code for reply in replies] == [200, 200]


async def test_body_over_the_limit_is_413(open_site: Any) -> None:
    async with open_site(limits=Limits(body_bytes=2048)) as site:
        reply = await site.chat("x" * 3000)
        assert reply.status_code == 413
        assert "2048 bytes" in reply.json()["detail"]
        assert (await site.chat()).status_code == 200


async def test_compressed_bodies_are_read_and_other_codings_refused(open_site: Any) -> None:
    async with open_site() as site:
        body = gzip.compress(b'{"prompt": "hi"}')
        read = await site.client.post("/chat", content=body, headers={"Content-Encoding": "gzip"})
        refused = await site.client.post("/chat", content=body, headers={"Content-Encoding": "br"})
    assert (read.status_code, refused.status_code) == (200, 415)
    assert refused.headers["accept-encoding"] == "gzip, deflate, zstd"
    assert "'br'" in refused.json()["detail"]


async def test_checks_come_in_order(open_site: Any) -> None:
    """Key, declared size, a place in the queue, the body: each refusal is the first that applies."""
    limits = Limits(rows=1, queue=0, body_bytes=2048)
    large, broken = b"x" * 3000, b"x"
    sesame = {"Authorization": "Bearer sesame"}
    async with open_site(api_key="sesame", limits=limits, pace_s=0.02) as site:
        post = site.client.post
        assert (await post("/chat", content=large)).status_code == 401
        assert (await post("/chat", content=broken, headers=sesame)).status_code == 400
        first = asyncio.create_task(post("/chat", json={"prompt": "hi"}, headers=sesame))
        await asyncio.sleep(0.05)
        assert (await post("/chat", content=large, headers=sesame)).status_code == 413
        assert (await post("/chat", content=broken, headers=sesame)).status_code == 429
        assert (await first).status_code == 200


@pytest.mark.parametrize(
    "path", ["/chat/", "//chat", "/chat//", "/v1/chat/completions/", "//v1//completions"]
)
async def test_superfluous_slashes_are_no_redirect(open_site: Any, path: str) -> None:
    body = (
        {"prompt": "hi"} if "completions/" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    )
    async with open_site() as site:
        assert (await site.client.post(f"http://test{path}", json=body)).status_code == 200


async def test_slashes_open_nothing_that_the_key_closes(open_site: Any) -> None:
    async with open_site(api_key="sesame") as site:
        assert (await site.client.get("/livez/")).status_code == 200
        for path in ("/livez/../v1/models", "//v1/models", "/v1/models/", "/livez//models"):
            assert (await site.client.get(f"http://test{path}")).status_code == 401


async def test_every_get_route_answers_head_and_every_route_options(open_site: Any) -> None:
    async with open_site() as site:
        for method, path in operations(site.app):
            head = await site.client.head(path)
            options = await site.client.options(path)
            assert options.status_code == 204, path
            assert {method, "OPTIONS"} <= set(options.headers["allow"].split(", "))
            if method == "GET":
                get = await site.client.get(path)
                assert head.status_code == get.status_code, path
                assert head.headers["content-type"] == get.headers["content-type"]
            elif method == "POST":
                assert (head.status_code, head.headers["allow"]) == (405, options.headers["allow"])
        assert (await site.client.options("/nowhere")).status_code == 404
