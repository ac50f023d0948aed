"""A page of another site in a visitor's Chromium, over plain http: it gets at neither key nor open server."""

import http.server
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser import ENTER, Browser, browser
from tests.serving.conftest import Process, start_fake_server, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="apt-get install chromium chromium-driver"
    ),
]

NAMES = "MAP victim.test 127.0.0.1, MAP evil.test 127.0.0.1, MAP rebound.test 127.0.0.1"
KEY = "sesame-opens-it"
QUESTION = '{"prompt": "hi", "lora_name": "shop", "x": "'

ATTACK = """
const [victim, question] = arguments, json = question + '"}';
const form = (path, enctype) => {
  const frame = document.body.appendChild(document.createElement("iframe"));
  frame.name = path + enctype;
  const form = document.body.appendChild(document.createElement("form"));
  Object.assign(form, {method: "post", action: victim + path, enctype, target: frame.name});
  const input = form.appendChild(document.createElement("input"));
  Object.assign(input, {name: question, value: '"}'});
  form.submit();
};
const load = (tag, path) => { document.body.appendChild(document.createElement(tag)).src = victim + path; };
for (const path of ["/chat", "/v1/unload_lora_adapter"]) {
  for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    form(path, enctype);
  const post = {method: "POST", body: json, credentials: "include"};
  fetch(victim + path, {...post, mode: "no-cors"}).catch(() => {});
  fetch(victim + path, {...post, headers: {"Content-Type": "application/json"}}).catch(() => {});
  navigator.sendBeacon(victim + path, json);
  navigator.sendBeacon(victim + path, new Blob([json]));
  load("img", path + "?prompt=hi&lora_name=shop");
  load("script", path + "?prompt=hi&lora_name=shop");
}
"""
"""Everything a page can send without asking first, and one request that it has to ask for, to two routes."""
POSTS = 2 * (3 + 1 + 1 + 2)
"""Of them, those that are refused for where they come from; the others ask for what GET does not do."""


class Blank(http.server.BaseHTTPRequestHandler):
    """An empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><link rel=icon href=data:,><body>")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def evil() -> Iterator[str]:
    """The other site's page."""
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blank)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield f"http://evil.test:{site.server_port}"
    site.shutdown()
    site.server_close()


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """One browser, which resolves the sites' names to this machine."""
    with browser(f"--host-resolver-rules={NAMES}", "--no-proxy-server") as opened:
        yield opened


Serve = Callable[..., tuple[Process, str]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts a server with these settings and returns it with its address by name."""
    started: list[Process] = []

    def start(**config: Any) -> tuple[Process, str]:
        config = {"allowed_hosts": ["victim.test"]} | config
        if "api_key" in config:
            config["adapter_root"] = str(tmp_path)
        server = start_fake_server(engine={"rows": 8, "adapters": ["shop"]}, config=config)
        started.append(server)
        return server, server.url.replace("127.0.0.1", "victim.test")

    yield start
    for server in started:
        server.close()


def counted(server: Process, name: str, labels: str = "") -> float:
    """Return a counter of /metrics."""
    found = re.findall(rf"^{name}{{.*{labels}}} (\S+)", server.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def refused(server: Process, status: int) -> float:
    """Return how many requests were answered so."""
    return counted(server, "runtime:requests_refused_total", f'status="{status}"')


def attack(window: Browser, server: Process, *, page: str, victim: str) -> None:
    """Have a page do its worst; AssertionError where the server did anything for it."""
    window.open(page)
    window.run(ATTACK, victim, QUESTION)
    until(lambda: refused(server, 403) >= POSTS and refused(server, 405) + refused(server, 401) >= 4, 60)
    assert counted(server, "vllm:prompt_tokens_total") == 0
    assert models(server) == ["base", "shop"]


def models(server: Process) -> list[str]:
    """Return the models that are served now."""
    reply = httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    return [model["id"] for model in reply.json()["data"]]


def test_page_of_another_site_cannot_use_an_open_server(window: Browser, serve: Serve, evil: str) -> None:
    server, victim = serve()
    attack(window, server, page=evil, victim=victim)


def test_page_of_another_site_cannot_use_the_stored_key(window: Browser, serve: Serve, evil: str) -> None:
    """The chat page itself works with it."""
    server, victim = serve(api_key=KEY)
    window.open(victim.replace("//", f"//user:{KEY}@") + "/v1/models")
    attack(window, server, page=evil, victim=victim)
    window.open(victim)
    until(lambda: window.texts("#left option") == ["base", "shop"])
    window.type("#prompt", "hello" + ENTER)
    until(lambda: "tokens" in "".join(window.texts(".note")))
    assert counted(server, "vllm:prompt_tokens_total") > 0


def test_page_whose_name_points_here_cannot_use_a_loopback_server(window: Browser, serve: Serve) -> None:
    """DNS rebinding: the browser takes the server for the page's own."""
    server, victim = serve()
    window.open(victim.replace("victim.test", "rebound.test"))
    asked = """
        const headers = {"Content-Type": "application/json"};
        const post = {method: "POST", headers, body: '{"prompt": "hi"}'};
        return Promise.all([fetch("/chat", post), fetch("/v1/models")]).then(rs => rs.map(r => r.status));
    """
    assert window.run(asked) == [403, 403]
    assert counted(server, "vllm:prompt_tokens_total") == 0


def test_allowed_page_reads_answers_errors_and_request_ids(window: Browser, serve: Serve, evil: str) -> None:
    _, victim = serve(api_key=KEY, allowed_origins=[evil])
    window.open(evil)
    asked = """
        const [victim, key] = arguments;
        const post = key => fetch(victim + "/v1/chat/completions", {method: "POST", body:
          '{"messages": [{"role": "user", "content": "hi"}]}', headers: {"Content-Type": "application/json",
          "Authorization": "Bearer " + key, "X-Stainless-Lang": "js", "X-Stainless-Retry-Count": "0"}});
        return Promise.all([post(key), post("wrong")]).then(replies => Promise.all(replies.map(
          async r => [r.status, r.headers.get("x-request-id"), Object.keys(await r.json())])));
    """
    right, wrong = window.run(asked, victim, KEY)
    assert (right[0], wrong[0], wrong[2]) == (200, 401, ["error"])
    assert right[1]
    assert wrong[1]
