"""The server as a process: port, loading, signals, slow and absent clients, bursts, leaks. Real sockets."""

import contextlib
import errno
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.serving.http.server import bind, key_file, url
from runtime.serving.settings import ServeConfig
from tests.bench.soak import soak
from tests.serving.conftest import until
from tests.serving.test_loading import served

SLOW = {"rows": 4, "queue": 8, "pace_s": 0.05, "context_tokens": 4096}


def endless(url: str, **more: Any) -> Any:
    """Open a stream of 2,000 tokens."""
    body = {"prompt": "hi", "stream": True, "max_new_tokens": 2000, **more}
    return httpx.stream("POST", url + "/chat", json=body, timeout=60)


def test_port_in_use_is_one_clear_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use on 127.0.0.1.*--port"):
            bind("127.0.0.1", port)


def test_forbidden_port_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(socket.socket):
        def bind(self, address: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Forbidden)
    with pytest.raises(ConfigError, match=r"may not bind port 80.*--port.*NET_BIND_SERVICE"):
        bind("127.0.0.1", 80)


def test_alive_but_not_ready_while_loading(start_server: Any) -> None:
    server = start_server(load_s=1.0, ready=False)
    assert server.get("/livez").status_code == 200
    not_ready = server.get("/readyz")
    assert (not_ready.status_code, not_ready.json()["detail"]) == (503, "loading")
    chat = httpx.post(server.url + "/chat", json={"prompt": "hi"})
    assert (chat.status_code, chat.headers["retry-after"]) == (503, "1")
    server.wait_ready()
    assert httpx.post(server.url + "/chat", json={"prompt": "hi"}).status_code == 200
    assert any("Model loaded successfully" in line for line in server.log)


def test_failed_loading_ends_the_process_with_its_exit_code(start_server: Any) -> None:
    server = start_server(fail="the model does not fit", load_s=0.2, ready=False)
    assert server.process.wait(60) == 6
    until(lambda: "Error: the model does not fit\n" in server.log)
    assert not any("Traceback" in line for line in server.log)


def test_sigterm_while_loading_exits_at_once(start_server: Any) -> None:
    """Fault 47."""
    server = start_server(load_s=600, ready=False)
    assert server.stop() == 0


def test_sigterm_lets_streams_finish(start_server: Any) -> None:
    """Fault 46: not ready at once, new requests during the delay, then refused; streams end complete."""
    server = start_server(engine=SLOW, config={"drain_delay_s": 2, "drain_timeout_s": 60})

    def stream() -> str:
        with endless(server.url, max_new_tokens=80) as reply:
            return reply.read().decode()

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream) for _ in range(3)]
        until(lambda: server.running() == 3)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/readyz").status_code == 503)
        late = pool.submit(stream)
        until(lambda: server.running() == 4)
        body = {"prompt": "hi", "max_new_tokens": 1}
        until(lambda: httpx.post(server.url + "/chat", json=body, timeout=60).status_code == 503)
        assert all(one.result().endswith("data: [DONE]\n\n") for one in [*streams, late])
    assert server.process.wait(60) == 0


def test_sigterm_cancels_what_does_not_finish(start_server: Any) -> None:
    server = start_server(engine=SLOW, config={"drain_timeout_s": 0.3})
    with ThreadPoolExecutor(2) as pool, endless(server.url) as stream:
        body = {"prompt": "hi", "max_new_tokens": 2000}
        complete = pool.submit(httpx.post, server.url + "/chat", json=body, timeout=60)
        until(lambda: server.running() == 2)
        server.process.send_signal(signal.SIGTERM)
        text = stream.read().decode()
        answer = complete.result()
    last = json.loads(text.rstrip().split("\n\n")[-1].removeprefix("data: "))
    assert "shutting down" in last["error"]["message"]
    assert "[DONE]" not in text
    assert answer.status_code == 503
    assert server.process.wait(60) == 0


def test_a_step_that_does_not_end_cannot_hold_the_exit(start_server: Any) -> None:
    server = start_server(engine=SLOW, config={"drain_timeout_s": 0}, close_s=60)
    started = time.monotonic()
    assert server.stop(timeout_s=60) == 1
    assert time.monotonic() - started > 4.5
    until(
        lambda: any("Not closed 5 s after SIGTERM: still waiting for a step" in line for line in server.log)
    )


@pytest.mark.parametrize("answers", [1, 8])
def test_an_unread_stream_cannot_hold_the_exit(start_server: Any, answers: int) -> None:
    engine = {"rows": 8, "queue": 8, "context_tokens": 8192}
    server = start_server(engine=engine, config={"drain_timeout_s": 0.5, "limits": {"new_tokens": 8000}})
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": answers, "max_tokens": 8000}
    with sent(server, json.dumps(body | {"logprobs": True, "top_logprobs": 20}).encode()):
        until(lambda: server.running() > 0)
        time.sleep(0.5)
        assert server.stop() == 0  # 1 where it has to be cut short after 5 s
    until(lambda: any("Stopped" in line for line in server.log))
    assert any("Cut off 1 connections" in line for line in server.log)
    assert not any("Not closed" in line or "Traceback" in line for line in server.log)


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_still_arrives_is_refused_at_sigterm(start_server: Any, framing: str) -> None:
    server = start_server(engine=SLOW)
    with sent(server, b"1\r\n{\r\n", f"{framing}\r\nExpect: 100-continue") as client:
        client.settimeout(60)
        assert client.recv(4096).startswith(b"HTTP/1.1 100 ")  # it waits for the body
        server.process.send_signal(signal.SIGTERM)
        assert closed(client).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(60) == 0
    until(lambda: any("Stopped" in line for line in server.log))
    assert not any("Traceback" in line or "Cancel" in line for line in server.log)


def test_second_sigterm_exits_at_once(start_server: Any) -> None:
    server = start_server(engine=SLOW, config={"drain_timeout_s": 600})
    with endless(server.url) as stream:
        chunks = stream.iter_text()
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/readyz").status_code == 503)
        assert server.stop() == 128 + signal.SIGTERM  # without draining


def test_client_that_disconnects_frees_its_sequence(start_server: Any) -> None:
    """Fault 40, streaming."""
    server = start_server(engine=SLOW)
    with endless(server.url) as stream:
        chunks = stream.iter_text()
        next(chunks)
        assert server.running() == 1
    until(lambda: server.running() == 0)  # the answer takes 100 s


def test_client_that_disconnects_without_streaming_frees_its_sequence(start_server: Any) -> None:
    """Fault 40, not streaming."""
    server = start_server(engine=SLOW)
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000}).encode()
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        client.sendall(head + body)
        until(lambda: server.running() == 1)
    until(lambda: server.running() == 0)  # the answer takes 100 s


def test_waiting_client_that_disconnects_never_runs(start_server: Any) -> None:
    server = start_server(engine={**SLOW, "rows": 1})
    with endless(server.url) as first:
        chunks = first.iter_text()
        next(chunks)
        with endless(server.url) as second:
            assert second.status_code == 200
        until(lambda: 'num_requests_waiting{model_name="base"} 0.0' in server.get("/metrics").text)
        assert server.running() == 1


@contextlib.contextmanager
def sent(server: Any, body: bytes, framing: str = "") -> Iterator[socket.socket]:
    """Send a body to /v1/chat/completions, whole unless `framing` says that there is more; read nothing."""
    framing = framing or f"Content-Length: {len(body)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(head.encode() + body)
        yield client


def resident_kb(server: Any) -> int:
    """Return the resident memory of the server."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@pytest.mark.parametrize("chunked", [False, True])
def test_huge_body_is_413_and_never_held(start_server: Any, chunked: bool) -> None:
    """Fault 42."""
    server = start_server(config={"limits": {"body_bytes": 1 << 20}})
    before = resident_kb(server)
    part = b" " * (1 << 20)
    content = (part for _ in range(50)) if chunked else part * 50
    reply = httpx.post(server.url + "/v1/chat/completions", content=content, timeout=60)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert resident_kb(server) - before < 20_000
    assert server.get("/livez").status_code == 200


def test_slow_clients_are_cut_and_others_served(start_server: Any) -> None:
    """Fault 44: 200 connections that drip headers, 200 that drip a body."""
    limits = {"header_timeout_s": 1.0, "body_timeout_s": 1.0}
    server = start_server(config={"limits": limits})
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    heads = [socket.create_connection(address) for _ in range(200)]
    bodies = [socket.create_connection(address) for _ in range(200)]
    stop = threading.Event()

    def drip() -> None:
        for client in heads:
            client.sendall(b"POST /chat HTTP/1.1\r\n")
        for client in bodies:
            client.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        while not stop.wait(0.2):
            for client in [*heads, *bodies]:
                with contextlib.suppress(OSError):  # cut, as it should be
                    client.sendall(b"X")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert httpx.post(server.url + "/chat", json={"prompt": "hi"}, timeout=60).status_code == 200
        for client in heads:
            client.settimeout(60)
            assert closed(client) == b""
        for client in bodies:
            client.settimeout(60)
            assert b" 408 " in closed(client)
    finally:
        stop.set()
        thread.join()
        for client in [*heads, *bodies]:
            client.close()


def closed(client: socket.socket) -> bytes:
    """Return what the server sent before it closed the connection; fails when it does not close."""
    received = b""
    try:
        while data := client.recv(4096):
            received += data
    except ConnectionError:
        pass
    return received


def test_idle_connection_is_kept_between_requests(start_server: Any) -> None:
    server = start_server(config={"limits": {"header_timeout_s": 0.5}})
    with httpx.Client() as client:
        first = client.get(server.url + "/livez")
        time.sleep(0.8)
        second = client.get(server.url + "/livez")
        streams = [reply.extensions["network_stream"] for reply in (first, second)]
        addresses = [stream.get_extra_info("client_addr") for stream in streams]
    assert addresses[0] == addresses[1]


def test_small_writes_are_sent_at_once(start_server: Any) -> None:
    """Without TCP_NODELAY each reply, two small writes, waits for the client's acknowledgement: 40 ms."""
    server = start_server()
    took = []
    with httpx.Client(base_url=server.url) as client:
        for _ in range(40):
            started = time.monotonic()
            assert client.get("/livez").status_code == 200
            took.append(time.monotonic() - started)
    assert min(took[20:]) < 0.03, took


def test_engine_that_dies_ends_the_process(start_server: Any) -> None:
    server = start_server(engine={"dies_after": 3})
    httpx.post(server.url + "/chat", json={"prompt": "hi"}, timeout=60)
    assert server.process.wait(60) == 1
    until(lambda: any("engine has died" in line for line in server.log))


@pytest.mark.long
def test_thousand_requests_at_once(start_server: Any) -> None:
    """Fault 41: only 200 and 429, probes stay fast, memory stays flat, nothing is left behind."""
    server = start_server(
        engine={"rows": 8, "queue": 64, "pace_s": 0.002, "context_tokens": 512},
        config={"limits": {"new_tokens": 16, "rows": 8, "queue": 64}},
    )
    before = resident_kb(server)
    took: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        while not stop.is_set():
            with httpx.Client(base_url=server.url) as client:  # as a kubelet: a connection of its own
                for _ in range(5):
                    started = time.monotonic()
                    assert client.get("/livez").status_code == 200
                    took.append(time.monotonic() - started)
                    time.sleep(0.005)

    prober = threading.Thread(target=probe)
    prober.start()
    script = Path(__file__).with_name("burst.py")
    ran = subprocess.run(
        [sys.executable, str(script), server.url, "1000"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    stop.set()
    prober.join()
    counts = json.loads(ran.stdout)
    assert set(counts) == {"200", "429"}
    assert sum(counts.values()) == 1000
    assert counts["200"] >= 72
    # A kubelet waits 1 s, and asks three times. Three processes share two cores here.
    took.sort()
    assert took[len(took) // 2] < 0.5, took[-20:]
    assert took[int(0.98 * len(took))] < 1, took[-20:]
    assert resident_kb(server) - before < 60_000
    assert server.running() == 0


@pytest.mark.parametrize(
    ("address", "port", "found"),
    [
        ("0.0.0.0", 80, "http://localhost"),
        ("0.0.0.0", 5000, "http://localhost:5000"),
        ("::", 5000, "http://localhost:5000"),
        ("127.0.0.1", 5000, "http://127.0.0.1:5000"),
        ("::1", 5000, "http://[::1]:5000"),
        ("10.0.0.7", 80, "http://10.0.0.7"),
    ],
)
def test_addresses_are_such_as_a_browser_opens(address: str, port: int, found: str) -> None:
    assert url(address, port) == found


def test_the_log_says_where_page_routes_and_api_are(start_server: Any) -> None:
    server = start_server()
    said = [f"Chat page: {server.url}/", f"Routes: {server.url}/docs", f"OpenAI API: {server.url}/v1"]
    until(lambda: all(any(f'"{line}"' in logged for logged in server.log) for line in said))


def test_log_is_one_json_object_a_line(start_server: Any) -> None:
    """Fault 58."""
    server = start_server()
    httpx.post(server.url + "/chat", json={"prompt": "sécret 🦜 prompt"})
    httpx.post(server.url + "/chat", content=b"{")
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
        client.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        client.recv(100)
    assert server.stop() == 0
    until(lambda: any("Stopped" in line for line in server.log))
    events = [json.loads(line) for line in server.log]
    answered = next(event for event in events if event["msg"].startswith("Answered"))
    assert answered["new_tokens"] > 0
    assert not any("cret" in line or "\r" in line for line in server.log)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.model
def test_memory_and_descriptors_stay_flat_under_mixed_traffic(tiny_llama_dir: Path) -> None:
    """Fault 59, briefly: twelve seconds of warming up (kernels for all sizes), then twenty measured."""
    config = {
        "model": {"name": "tiny", "path": str(tiny_llama_dir)},
        "served_name": "tiny",
        "host": "127.0.0.1",
        "port": 0,
    }
    for server in served(config):
        pid = server.process.pid
        soak(server.url, pid, seconds=12)
        report = soak(server.url, pid, seconds=20)
        assert server.running() == 0
    assert set(report.statuses) == {"200", "400", "left"}
    assert min(report.statuses.values()) >= 10, report.statuses
    assert report.files[1] <= report.files[0], report.files
    # 1,024 kernels kept, as is the libraries' default, were 400,000 kB by now; a leak of 1 kB a token 50,000.
    assert report.memory_kb[-1] - report.memory_kb[0] < 16_000, report.memory_kb


def test_the_file_of_keys_is_read_again_on_sighup(start_server: Any, tmp_path: Path) -> None:
    file, new = tmp_path / "keys", tmp_path / "new"
    file.write_text("a: sk-one-0123456789abcdef\n")
    server = start_server(config={"api_key_file": str(file)})

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(server.url + "/v1/models", headers=headers, timeout=60).status_code

    assert (status("sk-one-0123456789abcdef"), status("sk-two-0123456789abcdef")) == (200, 401)
    new.write_text("b: sk-two-0123456789abcdef\n")
    new.replace(file)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: status("sk-two-0123456789abcdef") == 200, timeout_s=60)
    assert status("sk-one-0123456789abcdef") == 401
    until(lambda: "added b; removed a" in "".join(server.log), timeout_s=60)
    assert "sk-" not in "".join(server.log)
    assert server.stop(timeout_s=60) == 0


def test_a_wrong_file_of_keys_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a: short\n")
    with pytest.raises(ConfigError, match="a: the key has 5 characters"):
        key_file(ServeConfig(model=ModelSource(name="m"), served_name="m", api_key_file=file))
