"""API key, request ids and limits on bodies, in this process."""

import asyncio
import base64
import gzip
import re
from typing import Any

import pytest
from starlette.routing import Route

from runtime.serving.http.middleware import OPEN_PATHS
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
