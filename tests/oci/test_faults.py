"""Registries that break (fault tests 29 to 37): what is sent again, what is not, and what is reported."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError, TransientError
from runtime.oci import Access
from tests.faults.registry import FaultyRegistry
from tests.oci.conftest import (
    AzureLike,
    Started,
    docker_config,
    files,
    fresh,
    quick,
    write_large,
)

pytestmark = pytest.mark.system


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 9 MB of weights count as very large and go in several chunks."""
    for name in ("CHUNK_BYTES", "REHEARSAL_BYTES", "CHUNKED_ABOVE_BYTES"):
        monkeypatch.setattr(f"runtime.oci.upload.{name}", 2 << 20)


in_chunks = pytest.mark.usefixtures("small_chunks")


def check(reference: oci.Reference, adapter: Path, tmp_path: Path, access: Access) -> None:
    """Pull past the faults and compare."""
    assert files(oci.pull(reference, tmp_path / "check", access=access)) == files(adapter)


@in_chunks
def test_29_token_expired_in_the_middle_continues_the_same_upload(
    azure: AzureLike, adapter: Path, tmp_path: Path
) -> None:
    access = quick(docker_config(tmp_path / "config.json", azure.host))
    challenge = f'Bearer realm="http://{azure.host}/oauth2/token",service="{azure.tokens.service}"'
    for skip in (1, 2):
        azure.front.fault(
            "PATCH",
            "/blobs/",
            "status",
            status=401,
            headers={"WWW-Authenticate": challenge},
            least=1_000_000,
            skip=skip,
        )
    reference = fresh(azure.host, "a")
    oci.push(adapter, reference, access=access)
    chunks = [s for s in azure.front.seen if s.method == "PATCH" and s.length > 500_000]
    assert len(chunks) == 7  # five, two of them refused once
    assert azure.front.count("POST", "/blobs/uploads/") - azure.front.count("POST", "zzz") <= 4
    tokens = {s.authorization for s in azure.front.seen if s.authorization.startswith("Bearer")}
    assert len(tokens) >= 2
    check(reference, adapter, tmp_path, access)


def test_29_token_expired_from_the_registrys_view_is_replaced(
    azure: AzureLike, adapter: Path, tmp_path: Path
) -> None:
    """The registry itself refuses a token whose end is past; the next one is good."""
    access = quick(docker_config(tmp_path / "config.json", azure.host))
    reference = fresh(azure.host, "a")
    store = oci.images.open_store(reference, access)
    from runtime.oci.blobs import from_bytes

    with contextlib.closing(store), store.writing():
        store.put_blob(from_bytes(b"one", "text/plain"), lambda count: None)
        store._login._token.header = f"Bearer {expired(azure)}"
        store.put_blob(from_bytes(b"two", "text/plain"), lambda count: None)
    assert azure.front.seen[-1].status == 201


def expired(azure: AzureLike) -> str:
    azure.tokens.age_s = 7200
    token = azure.tokens.sign([])
    azure.tokens.age_s = 0
    return token


REQUESTS = {
    "POST": "/blobs/uploads/",
    "PATCH": "/blobs/uploads/",
    "chunk": "/blobs/uploads/",
    "PUT": "/blobs/uploads/",
    "manifest": "/manifests/",
}


@pytest.mark.parametrize("request_kind", REQUESTS)
@pytest.mark.parametrize("fault", ["429", "500", "502", "503", "reset before", "reset after", "hang"])
def test_30_fault_on_any_request_is_survived(
    faulty: FaultyRegistry,
    adapter: Path,
    tmp_path: Path,
    request_kind: str,
    fault: str,
    request: pytest.FixtureRequest,
) -> None:
    method = {"manifest": "PUT", "chunk": "PATCH"}.get(request_kind, request_kind)
    if request_kind == "chunk":
        request.getfixturevalue("small_chunks")
    headers = {"Retry-After": "0"} if fault == "429" else {}
    if fault.isdigit():
        faulty.fault(method, REQUESTS[request_kind], "status", status=int(fault), headers=headers, times=2)
    else:
        faulty.fault(method, REQUESTS[request_kind], fault)  # type: ignore[arg-type]
    access = Access(files=(), backoff_s=0.01, read_timeout_s=0.5 if fault == "hang" else 5)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=access)
    assert faulty.faults[0].done >= 1
    check(reference, adapter, tmp_path, access)


def test_30_retry_after_is_kept_to(faulty: FaultyRegistry, adapter: Path) -> None:
    faulty.fault("PATCH", "/blobs/", "status", status=429, headers={"Retry-After": "1"})
    started = time.monotonic()
    oci.push(adapter, fresh(faulty.host, "a"), access=quick())
    assert time.monotonic() - started >= 1


def test_30_retries_end_and_the_last_answer_is_reported(faulty: FaultyRegistry, adapter: Path) -> None:
    body = b'{"errors":[{"code":"TOOMANYREQUESTS","message":"too many requests"}]}'
    faulty.fault("PATCH", "/blobs/", "status", status=429, body=body, least=1_000_000, times=99)
    with pytest.raises(TransientError, match=r"gave up after 6 tries.*TOOMANYREQUESTS"):
        oci.push(adapter, fresh(faulty.host, "a"), access=quick())
    assert sum(s.status == 429 for s in faulty.seen) == 6


def test_30_silent_registry_is_given_up(faulty: FaultyRegistry) -> None:
    faulty.fault("POST", "/v2/", "hang", times=99, headers={"seconds": "2"})
    with pytest.raises(TransientError, match="no answer in time"):
        oci.check_push(
            fresh(faulty.host, "a"), access=Access((), read_timeout_s=0.2, attempts=3, backoff_s=0.01)
        )


def test_30_closed_port_and_unknown_host_are_transient() -> None:
    access = Access((), attempts=2, backoff_s=0.01)
    with pytest.raises(TransientError, match="connection refused"):
        oci.check_push(oci.parse("127.0.0.1:1/a"), access=access)
    with pytest.raises(TransientError):
        oci.check_push(oci.parse("no-such-host.invalid/a"), access=access)


@in_chunks
def test_31_lost_reply_continues_after_what_the_registry_has(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    lost = faulty.fault("PATCH", "/blobs/", "reset after", least=1_000_000, skip=1, times=2)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    assert lost.done == 2
    ranges = [s.content_range for s in faulty.seen if s.method == "PATCH" and s.content_range]
    assert len(ranges) == len(set(ranges)) == 5  # no chunk was sent twice
    check(reference, adapter, tmp_path, quick())


@in_chunks
def test_31_progress_is_not_counted_as_failure(faulty: FaultyRegistry, adapter: Path, tmp_path: Path) -> None:
    """Every reply is lost, yet every chunk arrives: five losses are no reason to give up after three."""
    faulty.fault("PATCH", "/blobs/", "reset after", times=99)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=Access((), attempts=3, backoff_s=0.01))
    check(reference, adapter, tmp_path, quick())


@in_chunks
def test_31_half_a_chunk_continues_in_the_middle_of_it(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    faulty.fault("PATCH", "/blobs/", "reset half", least=1_000_000, skip=1)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    starts = [int(s.content_range.split("-")[0]) for s in faulty.seen if s.content_range]
    assert 3 << 20 in starts  # chunk two began at 2 MiB and broke after 1
    check(reference, adapter, tmp_path, quick())


@in_chunks
def test_31_416_asks_the_registry_where_it_is(faulty: FaultyRegistry, adapter: Path, tmp_path: Path) -> None:
    faulty.fault("PATCH", "/blobs/", "status", status=416, least=1_000_000, skip=2)
    faulty.fault("PUT", "/blobs/uploads/", "status", status=416, skip=1)  # acr#866
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    assert faulty.count("GET", "/blobs/uploads/") >= 2
    check(reference, adapter, tmp_path, quick())


@in_chunks
def test_32_forgotten_upload_starts_anew(faulty: FaultyRegistry, adapter: Path, tmp_path: Path) -> None:
    body = b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN","message":"blob upload unknown"}]}'
    faulty.fault("PATCH", "/blobs/", "status", status=404, body=body, least=1_000_000, skip=2)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    starts = [s.content_range.split("-")[0] for s in faulty.seen if s.content_range]
    assert starts.count("0") == 2
    check(reference, adapter, tmp_path, quick())


@in_chunks
def test_32_registry_that_cannot_resume_gets_the_blob_anew(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    """Debian's registry itself: after a lost reply it knows nothing of the upload by its old address."""
    faulty.remembers = False
    faulty.fault("PATCH", "/blobs/", "reset after", least=1_000_000, skip=2)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    check(reference, adapter, tmp_path, quick())


@in_chunks
def test_32_upload_forgotten_for_ever_ends(faulty: FaultyRegistry, adapter: Path) -> None:
    faulty.fault("PATCH", "/blobs/", "status", status=404, times=99)
    with pytest.raises(RegistryError, match="lost the upload"):
        oci.push(adapter, fresh(faulty.host, "a"), access=quick())


def test_413_makes_chunks_smaller(faulty: FaultyRegistry, adapter: Path, tmp_path: Path) -> None:
    faulty.body_limit = 700_000
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    assert max(s.length for s in faulty.seen if s.method == "PATCH") <= 700_000
    check(reference, adapter, tmp_path, quick())


@pytest.mark.slow
def test_35_killed_push_sends_only_what_is_missing(faulty: FaultyRegistry, tmp_path: Path) -> None:
    """kill -9 in the middle of 500 MB: the rerun skips finished files, and the tag comes last."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(5):
        write_large(folder / f"model-{number}.safetensors", 100, seed=number)
    reference = fresh(faulty.host, "big")
    program = (
        "import sys; from pathlib import Path; from runtime import oci\n"
        "import runtime.oci.images as images; images._PARALLEL = 2\n"
        "oci.push(Path(sys.argv[1]), oci.parse(sys.argv[2]))"
    )
    push = [sys.executable, "-c", program, str(folder), str(reference)]
    faulty.slow_bytes_s = 250e6
    first = subprocess.Popen(push)
    while faulty.count("PUT", "/blobs/uploads/") < 3:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)
    assert faulty.count("PUT", "/manifests/") == 0
    finished = sum(1 for s in faulty.seen if s.method == "PUT" and s.status == 201)
    assert 1 <= finished < 5
    faulty.seen.clear()
    faulty.slow_bytes_s = None
    subprocess.run(push, check=True)
    assert faulty.sent() <= (5 - finished) * 101 * (1 << 20) + 10_000
    assert faulty.seen[-1].method == "PUT"
    assert "/manifests/v1" in faulty.seen[-1].path
    info = oci.inspect(reference, quick())
    assert len(info.manifest.layers) == 5


@pytest.mark.slow
def test_35_killed_push_of_one_file_goes_on_inside_it(faulty: FaultyRegistry, tmp_path: Path) -> None:
    """kill -9 in one very large file: a registry that resumes uploads is sent the rest and no more."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_large(folder / "adapter_model.safetensors", 300, seed=6)
    reference = fresh(faulty.host, "one")
    program = (
        "import os, sys; from runtime.oci import upload; from runtime.cli.main import run\n"
        "upload.CHUNKED_ABOVE_BYTES = 200 << 20\n"
        "sys.exit(run(['push', *sys.argv[1:]], os.environ))"
    )
    push = [sys.executable, "-c", program, str(folder), str(reference)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    faulty.slow_bytes_s = 300e6
    first = subprocess.Popen(push, env=environment)
    while sum(seen.length > 1 << 20 for seen in faulty.seen) < 3:
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    time.sleep(1)
    stored = max(offset for _, offset in faulty.uploads.values())
    faulty.seen.clear()
    faulty.slow_bytes_s = None
    subprocess.run(push, env=environment, check=True)
    assert stored >= (5 + 64 + 64) << 20
    assert faulty.sent() < (301 << 20) - stored + 10_000
    assert oci.inspect(reference, quick()).manifest.size > 300 << 20
    assert not list((tmp_path / ".cache/workspace-runtime/uploads").iterdir())


def test_36_other_digest_than_ours_is_an_error(faulty: FaultyRegistry, adapter: Path) -> None:
    faulty.fault("PUT", "/manifests/", "wrong digest")
    with pytest.raises(RegistryError, match="instead of"):
        oci.push(adapter, fresh(faulty.host, "a"), access=quick())
    faulty.fault("PUT", "/blobs/uploads/", "wrong digest", times=9)
    with pytest.raises(RegistryError, match="instead of"):
        oci.push(adapter, fresh(faulty.host, "b"), access=quick())


def test_36_flipped_byte_in_an_upload_is_refused_by_the_registry_and_sent_again(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.oci import blobs

    read, once = blobs.PartsReader.read, [True]

    def flip(self: blobs.PartsReader, size: int = -1, /) -> bytes:
        data = read(self, size)
        if once and len(data) > 1_000_000 and sys._getframe(1).f_code.co_name == "read":
            once.clear()
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    monkeypatch.setattr(blobs.PartsReader, "read", flip)
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    assert not once
    check(reference, adapter, tmp_path, quick())


@pytest.mark.parametrize("fault", ["cut", "reset before", "503"])
def test_interrupted_download_goes_on_where_it_stopped(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path, fault: str
) -> None:
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    faulty.seen.clear()
    if fault == "503":
        faulty.fault("GET", "/blobs/", "status", status=503, times=3)
    else:
        faulty.fault("GET", "/blobs/", fault, times=3)  # type: ignore[arg-type]
    check(reference, adapter, tmp_path, quick())
    partial = [s for s in faulty.seen if s.status == 206]
    assert bool(partial) == (fault == "cut")


def test_download_with_a_flipped_byte_is_fetched_once_more_then_refused(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    faulty.fault("GET", "/blobs/", "flip")
    check(reference, adapter, tmp_path, quick())
    faulty.fault("GET", "/blobs/", "flip", times=99)
    with pytest.raises(RegistryError, match="other bytes"):
        oci.pull(reference, tmp_path / "back", access=quick())
    assert not (tmp_path / "back").exists()


def test_flipped_manifest_is_refused(faulty: FaultyRegistry, adapter: Path, tmp_path: Path) -> None:
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    faulty.fault("GET", "/manifests/", "flip")
    with pytest.raises(RegistryError, match="damaged"):
        oci.pull(reference, tmp_path / "back", access=quick())


def test_killed_pull_leaves_no_folder_and_keeps_what_it_has(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    reference = fresh(faulty.host, "a")
    oci.push(adapter, reference, access=quick())
    weights = max(oci.inspect(reference, quick()).manifest.layers, key=lambda layer: layer.size)
    faulty.fault("GET", weights.digest, "cut", times=99)
    with pytest.raises(TransientError):
        oci.pull(reference, tmp_path / "x/back", access=Access((), attempts=1))
    assert not (tmp_path / "x/back").exists()
    kept = sum(p.stat().st_size for p in (tmp_path / "x").rglob("*.part"))
    assert kept > 500_000
    faulty.faults.clear()
    faulty.seen.clear()
    assert files(oci.pull(reference, tmp_path / "x/back", access=quick())) == files(adapter)
    assert any(s.status == 206 for s in faulty.seen)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["back"]


def test_blob_is_mounted_from_another_repository(
    open_registry: Started, faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    from runtime.oci.image import build

    first, second = fresh(faulty.host, "from"), fresh(faulty.host, "to")
    oci.push(adapter, first, access=quick())
    faulty.seen.clear()
    image = build(adapter, tmp_path)
    oci.push_image(lambda: image, second, access=quick(), mount_from=first.repository)
    assert faulty.sent() == 0
    check(second, adapter, tmp_path, quick())


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_refused_mount_becomes_an_upload(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path, status: int
) -> None:
    from runtime.oci.image import build

    first, second = fresh(faulty.host, "from"), fresh(faulty.host, "to")
    oci.push(adapter, first, access=quick())
    headers = {"WWW-Authenticate": 'Basic realm="x"'} if status == 401 else {}
    faulty.fault("POST", "mount=", "status", status=status, headers=headers, times=9)
    oci.push_image(lambda: build(adapter, tmp_path), second, access=quick(), mount_from=first.repository)
    check(second, adapter, tmp_path, quick())


@pytest.mark.parametrize("way", ["push", "pull"])
def test_05_interrupt_ends_a_transfer_at_once(faulty: FaultyRegistry, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(random.Random(2).randbytes(60_000_000))
    reference = fresh(faulty.host, "big")
    if way == "pull":
        oci.push(folder, reference, access=quick())
        folder = tmp_path / "back"
    faulty.slow_bytes_s = 5e5
    program = (
        "import signal, sys; from runtime.cli.main import run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it\n"
        "sys.exit(run(sys.argv[1:], {}))"
    )
    arguments = [str(folder), str(reference)] if way == "push" else [str(reference), str(folder)]
    process = subprocess.Popen([sys.executable, "-c", program, way, *arguments])
    wanted = "PATCH" if way == "push" else "GET"
    while not any(method == wanted and "/blobs/" in path for method, path in faulty.begun):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert time.monotonic() - began < 60  # 0.5; the blob takes another 100
    assert way == "push" or not folder.exists()


def test_failure_of_one_blob_calls_the_others_off(faulty: FaultyRegistry, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(random.Random(2).randbytes(60_000_000))
    (folder / "adapter_config.json").write_text("{}")
    faulty.slow_bytes_s = 5e5
    faulty.fault("PUT", "/blobs/uploads/", "status", status=418)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="418"):
        oci.push(folder, fresh(faulty.host, "a"), access=quick())
    assert time.monotonic() - started < 60  # 1; the other blob takes 120
