"""Requests to a registry: every status decided, proxies named, redirects one hop at a time."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError, Failure, RegistryError, TransientError
from runtime.oci.hosts import same_host
from tests.faults.quirky_registry import BASIC, PASSWORD, USER, Quirks
from tests.oci.conftest import Start, docker_config, fresh, quick


class Answers(http.server.ThreadingHTTPServer):
    """Answers every request with one status and these headers, and keeps what was requested."""

    daemon_threads = True

    def __init__(self, status: int, **headers: str):
        super().__init__(("127.0.0.1", 0), _Answering)
        self.status, self.headers = status, headers
        self.seen: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Answering(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Answers

    def handle_any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path))
        self.send_response(self.server.status)
        for key, value in self.server.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = handle_any  # noqa: N815 - its names

    def log_message(self, *args: object) -> None:
        """The tests read `seen` instead."""


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[Answers]:
    status, headers = request.param if isinstance(request.param, tuple) else (request.param, {})
    server = Answers(status, **headers)
    yield server
    server.shutdown()
    server.server_close()


FINAL = [400, 402, 405, 406, 409, 410, 411, 412, 413, 415, 418, 421, 422, 451, 501, 505, 507]
AGAIN = [408, 425, 429, 500, 502, 503, 504, 508, 520, 522, 524, 530]


@pytest.mark.parametrize(
    ("answering", "kind", "tries"),
    [*((status, RegistryError, 1) for status in FINAL), *((status, TransientError, 3) for status in AGAIN)],
    indirect=["answering"],
)
def test_every_status_is_final_or_tried_again(answering: Answers, kind: type[Failure], tries: int) -> None:
    with pytest.raises(kind, match=str(answering.status)):
        oci.inspect(oci.parse(f"{answering.host}/x"), quick(attempts=3))
    assert sum("/manifests/" in path for _, path in answering.seen) == tries


@pytest.mark.parametrize(
    "answering",
    [
        (307, {"Location": "http://[bad/"}),
        (302, {"Location": "file:///etc/passwd"}),
        (308, {"Location": "http://x:99999/"}),
        (301, {"Location": "http://\u00ff\u00fe/"}),
        (302, {"Location": "/v2/x/manifests/latest"}),
        (307, {"Location": "http://169.254.169.254/latest/meta-data"}),
        (303, {"Location": "http://2852039166/"}),
    ],
    indirect=True,
    ids=range(7),
)
def test_redirect_that_leads_nowhere_is_one_line(answering: Answers) -> None:
    with pytest.raises(Failure) as caught:
        oci.inspect(oci.parse(f"{answering.host}/x"), quick(attempts=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["[bad", "x:99999", "\u00ff.invalid", "169.254.169.254"])
def test_location_that_leads_nowhere_is_one_line(start: Start, location: str) -> None:
    server = start()
    server.quirks = Quirks(location=location)
    with pytest.raises(Failure) as caught:
        oci.check_push(fresh(server.host, "x"), access=quick(attempts=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_bodies_are_sent_again_after_a_redirect(start: Start, adapter: Path, status: int) -> None:
    server = start(redirects_uploads=status)
    oci.push(adapter, fresh(server.host, "x"), access=quick())
    patches = [seen for seen in server.find("PATCH") if seen.port != server.port]
    assert max(seen.length for seen in patches) > 9_000_000


def test_password_in_an_address_replaces_no_login(start: Start, adapter: Path, tmp_path: Path) -> None:
    server = start(auth="basic")
    server.quirks = Quirks(auth="basic", location=f"evil:pw@{server.host}")
    access = quick(docker_config(tmp_path / "c.json", server.host, USER, PASSWORD))
    oci.push(adapter, fresh(server.host, "x"), access=access)
    assert {seen.headers["Authorization"] for seen in server.find("PATCH")} == {BASIC}


def through(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy)


def test_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, "http://someone:hidden@127.0.0.1:1")
    with pytest.raises(TransientError, match=r"the proxy 127\.0\.0\.1:1: connection refused") as caught:
        oci.inspect(oci.parse("registry.invalid/x"), quick(attempts=2))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("answering", [403, 407], indirect=True)
def test_proxy_that_refuses_is_named_at_once(answering: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, f"http://{answering.host}")
    with pytest.raises(RegistryError, match=rf"the proxy {answering.host} refused.*{answering.status}"):
        oci.inspect(oci.parse("registry.invalid/x"), quick())
    assert answering.seen == [("CONNECT", "registry.invalid:443")]


@pytest.mark.parametrize("answering", [407], indirect=True)
def test_proxy_that_wants_credentials_is_named_for_plain_http(
    answering: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, f"http://{answering.host}")
    with pytest.raises(RegistryError, match=rf"the proxy {answering.host} (wants credentials|refused)"):
        oci.inspect(oci.parse("registry.invalid/x"), quick(insecure=True))


@pytest.mark.parametrize("answering", [502], indirect=True)
def test_proxy_that_cannot_connect_is_tried_again(
    answering: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, f"http://{answering.host}")
    with pytest.raises(TransientError, match=rf"the proxy {answering.host}: it answered 502"):
        oci.inspect(oci.parse("registry.invalid/x"), quick(attempts=2))
    assert len(answering.seen) == 2


@pytest.mark.parametrize(("proxy", "words"), [("socks5://127.0.0.1:1", "SOCKS"), ("http://", "no address")])
def test_proxy_that_cannot_be_used_is_a_mistake_in_the_configuration(
    monkeypatch: pytest.MonkeyPatch, proxy: str, words: str
) -> None:
    through(monkeypatch, proxy)
    with pytest.raises(ConfigError, match=words):
        oci.inspect(oci.parse("registry.invalid/x"), quick())


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_this_machine_is_not_reached_through_a_proxy(
    start: Start, adapter: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    through(monkeypatch, "http://127.0.0.1:1")
    server = start()
    oci.push(adapter, fresh(f"{name}:{server.port}", "x"), access=quick())


def test_repository_is_named_as_it_is_written(start: Start, adapter: Path) -> None:
    """A host without dot and port, and a first name with a dot, are not taken for something else."""
    server = start()
    for repository in ("x", "my.team/x", "a/b/c"):
        oci.push(adapter, oci.parse(f"localhost:{server.port}/{repository}:v1"), access=quick())
        assert server.find("PUT", f"^/v2/{repository}/manifests/v1$")
    from runtime.oci.repository import Repository

    reading = Repository(oci.parse("localhost/x:1"), quick(attempts=1, connect_timeout_s=1))
    assert same_host(reading._base, "http://localhost/") and reading._base.endswith("localhost/v2/x")
