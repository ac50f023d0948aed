"""What is logged of refused requests: a line each, and counts where a client does not stop."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import StreamingResponse

from runtime.serving.http.refusals import BURST, Refusals
from tests.serving.http.test_app import figure

pytestmark = pytest.mark.anyio


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines about refusals."""
    return [record.getMessage() for record in caplog.records if "Refused" in record.getMessage()]


async def test_a_refusal_is_one_line_without_the_body(
    open_site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with open_site() as site:
        reply = await site.client.post(
            "/v1/chat/completions",
            json={"model": "absent", "messages": [{"role": "user", "content": "Zq8vN2tL"}]},
            headers={"X-Request-Id": "abc"},
        )
        assert (await site.client.get("/v1/models/none")).status_code == 404
        assert (await site.client.get("/etc%0A/passwd?key=Zq8vN2tL")).status_code == 404
        assert (await site.client.get("/livez")).status_code == 200
        metrics = (await site.client.get("/metrics")).text
    assert reply.status_code == 404
    first, second, third = lines(caplog)
    assert first.startswith("Refused POST /v1/chat/completions: 404 ")
    assert "model absent, request abc" in first
    assert "/v1/models/{" in second
    assert r"/etc\n/passwd" in third
    assert "Zq8vN2tL" not in first + second + third
    assert figure(metrics, "runtime:requests_refused_total", status="404") == 3
    record = next(record for record in caplog.records if "Refused" in record.getMessage())
    assert {"route", "status", "code", "model", "request_id"} == set(vars(record)["fields"])


async def test_health_that_is_not_ready_is_no_refusal(
    open_site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with open_site(ready=False) as site:
        assert (await site.client.get("/readyz")).status_code == 503
        assert (await site.chat()).status_code == 503
    (line,) = lines(caplog)
    assert "still loading" in line


async def test_a_client_in_a_loop_is_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    counted: list[int] = []
    refusals = Refusals(counted.append, window_s=2)
    scope = {"path": "/chat", "method": "POST", "state": {"request_id": "x", "error": {"code": "c"}}}
    for status in [401] * 500 + [404] * 30:
        refusals.note(scope, status)
    assert len(lines(caplog)) == BURST
    async with asyncio.timeout(60):
        while len(lines(caplog)) == BURST:
            await asyncio.sleep(0.02)
    refusals.note(scope, 401)
    assert lines(caplog)[BURST] == "Refused 510 more requests within 2 s: 480 times 401 c, 30 times 404 c"
    assert len(lines(caplog)) == BURST + 2
    assert len(counted) == 531


async def test_an_unexpected_error_is_openais_object_with_the_id(
    open_site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_site() as site:
        site.app.add_api_route("/broken", broken, methods=["POST"])
        reply = await site.client.post("/broken", json={}, headers={"X-Request-Id": "abc"})
        metrics = (await site.client.get("/metrics")).text
    assert reply.status_code == 500
    assert reply.headers["x-request-id"] == "abc"
    error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert "abc-" in error["message"]
    assert not {"Zero", "0x", "/srv", ".py"} & set(error["message"].split())
    assert figure(metrics, "runtime:requests_refused_total", status="500") == 1
    assert sum(record.exc_info is not None for record in caplog.records) == 1


async def test_an_error_within_an_answer_ends_the_connection(
    open_site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As if complete would be an answer that lacks its end, and nobody knows."""
    async with open_site() as site:
        site.app.add_api_route("/cut", cut)
        server = uvicorn.Server(uvicorn.Config(site.app, port=0, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/cut", headers={"X-Request-Id": "abc"})
            assert (await client.get("/livez")).status_code == 200
        server.should_exit = True
        await serving
    assert "Request abc-" in caplog.text
    assert sum(record.exc_info is not None for record in caplog.records) == 1


async def broken() -> None:
    """A route with a bug."""
    raise ZeroDivisionError("/srv/secret.py at 0x7fee201bb560")


async def cut() -> StreamingResponse:
    """A route with a bug behind its first bytes."""

    async def parts() -> Any:
        yield b"first"
        raise ZeroDivisionError("second")

    return StreamingResponse(parts())
