"""Which pages may call, in this process: what browsers send, and what they need in the answer."""

import base64
from typing import Any

import pytest

from runtime.serving.http.origins import known_hosts
from tests.serving.http.test_middleware import operations

pytestmark = pytest.mark.anyio

EVIL = "http://evil.example"
PAGE = "http://localhost:5173"
ALLOWED = frozenset({PAGE})
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-request-id,x-stainless-os",
}
OWN = [
    {},
    {"Origin": "http://test"},
    {"Origin": "http://TEST:80"},
    {"Origin": "https://test:443"},
    {"Origin": "https://chat.example", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
]
"""Of the server's own page, also behind a proxy with another Host, of users, and of programs."""
FOREIGN = [
    {"Origin": EVIL},
    {"Origin": "null"},
    {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
    {"Origin": "http://test:8080"},
    {"Origin": "http://test.evil.example"},
    {"Origin": "http://evil.example/test"},
    {"Origin": "http://test", "Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://other.test"},
    {"Sec-Fetch-Site": "none", "Origin": "chrome-extension://abcdefghijklmnop"},
]


@pytest.mark.parametrize("headers", FOREIGN)
async def test_no_route_but_reading_ones_serves_another_sites_page(
    open_site: Any, headers: dict[str, str]
) -> None:
    """By enumeration of the app's routes."""
    async with open_site() as site:
        for method, path in operations(site.app):
            if method in {"GET", "HEAD"}:
                continue
            reply = await site.client.request(method, path, headers=headers, json={"prompt": "hi"})
            assert reply.status_code == 403, path
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "origin_not_allowed")
            assert "--allow-origin" in error["message"]
        assert site.engine.stats().running == 0
        assert (await site.client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("headers", OWN)
async def test_own_page_and_programs_are_served(open_site: Any, headers: dict[str, str]) -> None:
    async with open_site() as site:
        assert (await site.client.post("/chat", json={"prompt": "hi"}, headers=headers)).status_code == 200


async def test_curl_without_a_content_type_of_its_own_is_served(open_site: Any) -> None:
    async with open_site() as site:
        for kind in ("application/x-www-form-urlencoded", "text/plain", None):
            headers = {"Content-Type": kind} if kind else {}
            reply = await site.client.post("/chat", content=b'{"prompt": "hi"}', headers=headers)
            assert reply.status_code == 200, kind


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_form_with_password_or_cookies_is_refused(open_site: Any, kind: str | None) -> None:
    """Browsers older than `Origin` on forms send nothing else that tells."""
    password = {"Authorization": "Basic " + base64.b64encode(b"me:sesame").decode()}
    async with open_site(api_key="sesame") as site:
        sent = password | ({"Content-Type": kind} if kind else {})
        reply = await site.client.post("/chat", content=b'{"prompt": "hi"}', headers=sent)
        assert reply.status_code == 403
        assert "application/json" in reply.json()["error"]["message"]
        assert (await site.client.post("/chat", json={"prompt": "hi"}, headers=password)).status_code == 200
    async with open_site() as site:
        sent = {"Cookie": "a=b"} | ({"Content-Type": kind} if kind else {})
        reply = await site.client.post("/chat", content=b'{"prompt": "hi"}', headers=sent)
        assert reply.status_code == 403


async def test_allowed_origin_is_answered_before_the_key_is_asked_for(open_site: Any) -> None:
    async with open_site(api_key="sesame", origins=ALLOWED) as site:
        reply = await site.client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "POST" in reply.headers["access-control-allow-methods"]
        allowed = reply.headers["access-control-allow-headers"].lower()
        assert PREFLIGHT["Access-Control-Request-Headers"] in allowed
        assert "Origin" in reply.headers["vary"]
        assert "access-control-allow-credentials" not in reply.headers
        assert reply.headers["x-request-id"]
        private = PREFLIGHT | {"Access-Control-Request-Private-Network": "true"}
        reply = await site.client.options("/v1/chat/completions", headers=private)
        assert reply.headers["access-control-allow-private-network"] == "true"
        foreign = await site.client.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": EVIL})
        assert foreign.status_code == 403
        assert "access-control-allow-origin" not in foreign.headers


async def test_no_origin_is_allowed_by_default(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert reply.status_code == 403
        models = await site.client.get("/v1/models", headers={"Origin": PAGE})
    assert not [name for name in [*reply.headers, *models.headers] if name.startswith("access-control")]


async def test_allowed_page_can_read_errors_and_request_ids(open_site: Any) -> None:
    """A refusal without the headers is a network error to the page."""
    async with open_site(api_key="sesame", origins=ALLOWED) as site:
        key = {"Authorization": "Bearer sesame"}
        for status, path, body, more in [
            (200, "/chat", {"prompt": "hi"}, key),
            (400, "/chat", {}, key),
            (401, "/chat", {"prompt": "hi"}, {}),
            (404, "/nowhere", {}, key),
            (415, "/chat", {}, key | {"Content-Type": "image/png"}),
        ]:
            reply = await site.client.post(path, json=body, headers={"Origin": PAGE} | more)
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == PAGE, status
            assert "Origin" in reply.headers["vary"]
            exposed = reply.headers["access-control-expose-headers"]
            own = {"x-request-id", "retry-after", "x-ignored-fields", "x-relaxed-schema"}
            assert own <= set(exposed.split(", "))


async def test_no_stored_password_works_for_an_allowed_origin(open_site: Any) -> None:
    """Its pages send the key themselves."""
    password = {"Authorization": "Basic " + base64.b64encode(b"me:sesame").decode()}
    async with open_site(api_key="sesame", origins=frozenset({"*"})) as site:
        for headers in FOREIGN:
            reply = await site.client.post("/chat", json={"prompt": "hi"}, headers=headers | password)
            assert reply.status_code == 401
            own = {"Authorization": "Bearer sesame"}
            reply = await site.client.post("/chat", json={"prompt": "hi"}, headers=headers | own)
            assert reply.status_code == 200


async def test_a_link_from_another_site_opens_the_page_with_the_stored_password(open_site: Any) -> None:
    headers = {
        "Authorization": "Basic " + base64.b64encode(b"me:sesame").decode(),
        "Sec-Fetch-Site": "cross-site",
        "Accept": "text/html",
    }
    async with open_site(api_key="sesame") as site:
        page = await site.client.get("/", headers=headers | {"Sec-Fetch-Mode": "navigate"})
        assert page.status_code == 200
        assert (await site.client.get("/", headers=headers | {"Sec-Fetch-Mode": "cors"})).status_code == 401


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:8000", True),
        ("LOCALHOST.", True),
        ("app.localhost", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.0.7", True),
        ("host.docker.internal:8000", True),
        ("box.lan", True),
        ("x", True),
        ("tunnel.example", True),
        ("", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("evil.example:8000", False),
    ],
)
async def test_a_loopback_server_answers_to_its_own_names_only(
    open_site: Any, host: str, known: bool
) -> None:
    hosts = known_hosts("box.lan", "127.0.0.1", ["Tunnel.example"])
    async with open_site(hosts=hosts) as site:
        for reply in (
            await site.client.get("/v1/models", headers={"Host": host}),
            await site.client.post("/chat", json={"prompt": "x"}, headers={"Host": host}),
        ):
            assert reply.status_code == (200 if known else 403)
            if not known:
                assert "--allow-host" in reply.json()["error"]["message"]


def test_a_server_that_others_reach_answers_to_every_name() -> None:
    assert known_hosts("0.0.0.0", "0.0.0.0", []) is None
    assert known_hosts("::", "::", ["a"]) is None
    assert known_hosts("10.0.0.7", "10.0.0.7", []) is None
    assert known_hosts("127.0.0.1", "127.0.0.1", ["*"]) is None
    assert known_hosts("::1", "::1", []) is not None
    assert known_hosts("localhost", "127.0.0.1", []) is not None


async def test_allowed_page_can_read_an_unexpected_error(open_site: Any) -> None:
    async with open_site(origins=ALLOWED) as site:
        site.app.add_api_route("/broken", broken)
        reply = await site.client.get("/broken", headers={"Origin": PAGE})
    assert reply.status_code == 500
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert reply.headers["x-request-id"] in reply.json()["error"]["message"]


async def broken() -> None:
    """A route with a bug."""
    raise ZeroDivisionError("/srv/secret.py at 0x7fee201bb560")
