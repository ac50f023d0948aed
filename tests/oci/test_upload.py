"""Uploads to the registries people push to, one row of quirks each; then one quirk at a time."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError, TransientError
from runtime.oci import upload
from runtime.oci.blobs import read_all
from runtime.oci.image import build
from tests.faults.quirky_registry import BASIC, PASSWORD, USER, Quirks, QuirkyRegistry
from tests.oci.conftest import Start, docker_config, files, fresh, quick

REGISTRIES = {
    "acr": Quirks(auth="bearer", body_limit=20_000_000, state=True, strict_azure=True),
    "ecr": Quirks(auth="basic", patch_status=201, stale_range=True, keeps_first_chunk_only=True, status=405),
    "ghcr": Quirks(auth="bearer", chunk_limit=4 << 20),
    "gar": Quirks(auth="bearer", chunk_refusal=400, status=404, keeps_partial=False),
    "pulp": Quirks(auth="bearer", patch_status=204, location="absolute"),
    "harbor": Quirks(auth="bearer", cookie="sid=1; Path=/; HttpOnly"),
    "quay": Quirks(auth="bearer", range_prefix="bytes=", status_extra=1, redirects_blobs=302),
    "jfrog": Quirks(auth="both", redirects_uploads=307, redirects_blobs=307),
    "hidden": Quirks(auth="bearer", anonymous=404, put_status=204),
}
"""What differs between registries, each with the login that it wants."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 MB that do not compress."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(random.Random(3).randbytes(12_000_000))
    return folder


@pytest.fixture(params=REGISTRIES)
def registry(request: pytest.FixtureRequest, start: Start) -> QuirkyRegistry:
    return start(REGISTRIES[request.param])


def blob_patches(server: QuirkyRegistry) -> list[int]:
    """Sizes of the bodies with weights in them."""
    return [seen.length for seen in server.find("PATCH") if seen.length > 100_000]


def test_push_and_pull_work_with_every_kind_of_registry(
    registry: QuirkyRegistry, weights: Path, tmp_path: Path
) -> None:
    access = quick(docker_config(tmp_path / "config.json", registry.host, USER, PASSWORD))
    reference = fresh(registry.host, "adapters/phi-3")
    oci.check_push(reference, access=access)
    oci.push(weights, reference, access=access)
    assert files(oci.pull(reference, tmp_path / "back", access=access)) == files(weights)
    assert not any("Cookie" in seen.headers for seen in registry.seen)
    elsewhere = [seen for seen in registry.seen if seen.port != registry.port]
    assert not any("Authorization" in seen.headers for seen in elsewhere)
    assert blob_patches(registry)[-1] > 12_000_000  # in one, without a Content-Range
    assert not any("Content-Range" in seen.headers for seen in registry.find("PATCH"))


@pytest.mark.slow
def test_killed_push_is_repeated_with_every_kind_of_registry(
    registry: QuirkyRegistry, weights: Path, tmp_path: Path
) -> None:
    """kill -9 in the middle of the weights: the next push continues or restarts, and the image is whole."""
    config = docker_config(tmp_path / "home/.docker/config.json", registry.host, USER, PASSWORD)
    reference = fresh(registry.host, "adapter")
    program = (
        "import os, sys; from pathlib import Path; from runtime import oci\n"
        "oci.push(Path(sys.argv[1]), oci.parse(sys.argv[2]), access=oci.from_environment(os.environ))"
    )
    command = [sys.executable, "-c", program, str(weights), str(reference)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
    for server in (registry, registry.elsewhere):
        assert server is not None
        server.slow_bytes_s = 20e6
    process = subprocess.Popen(command, env=environment)
    while registry.content.received < 6_000_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    for server in (registry, registry.elsewhere):
        server.slow_bytes_s = None  # type: ignore[union-attr]
    assert not registry.content.manifests
    subprocess.run(command, env=environment, check=True)
    assert files(oci.pull(reference, tmp_path / "back", access=quick(config))) == files(weights)
    assert not list((tmp_path / "home/.cache/workspace-runtime/uploads").iterdir())


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_success_is_taken_for_a_patch(start: Start, weights: Path, status: int) -> None:
    server = start(patch_status=status, put_status=status)
    oci.push(weights, fresh(server.host, "x"), access=quick())


@pytest.mark.parametrize("location", ["path", "absolute", "query", "localhost:{port}"])
@pytest.mark.parametrize("redirects", [None, 307, 308])
def test_location_is_relative_to_the_response(
    start: Start, weights: Path, location: str, redirects: int | None
) -> None:
    server = start(location=location, redirects_uploads=redirects)
    assert server.elsewhere is not None
    server.elsewhere.quirks = Quirks(location=location, state=location == "query")
    oci.push(weights, fresh(server.host, "x"), access=quick())


def test_authorization_goes_to_the_same_host_however_it_is_written(
    start: Start, weights: Path, tmp_path: Path
) -> None:
    server = start(auth="basic", location="LOCALHOST.:{port}")
    host = f"localhost:{server.port}"
    access = quick(docker_config(tmp_path / "config.json", host, USER, PASSWORD))
    oci.push(weights, fresh(host, "x"), access=access)
    assert all(seen.headers["Authorization"] == BASIC for seen in server.find("PATCH|PUT"))


def test_authorization_goes_to_no_other_host(start: Start, weights: Path, tmp_path: Path) -> None:
    """Another port is another host."""
    server = start(auth="basic")
    assert server.elsewhere is not None
    server.quirks = Quirks(auth="basic", location=server.elsewhere.host)
    access = quick(docker_config(tmp_path / "config.json", server.host, USER, PASSWORD))
    oci.push(weights, fresh(server.host, "x"), access=access)
    patches = server.find("PATCH")
    assert {seen.port for seen in patches} == {server.elsewhere.port}
    assert not any("Authorization" in seen.headers for seen in patches)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs above 8 MB count as very large, chunks are 2 MB."""
    monkeypatch.setattr(upload, "CHUNKED_ABOVE_BYTES", 8 << 20)
    monkeypatch.setattr(upload, "CHUNK_BYTES", 2 << 20)
    monkeypatch.setattr(upload, "REHEARSAL_BYTES", 1 << 20)


@pytest.mark.usefixtures("chunked")
def test_very_large_blob_is_sent_in_chunks_where_that_works(start: Start, weights: Path) -> None:
    server = start()
    oci.push(weights, fresh(server.host, "x"), access=quick())
    assert blob_patches(server)[:3] == [1 << 20, 2 << 20, 2 << 20]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(
    "quirks",
    [
        *(pytest.param(Quirks(chunk_refusal=status), id=str(status)) for status in (400, 404, 405, 416, 501)),
        pytest.param(Quirks(chunk_limit=500_000), id="416 too large"),
        pytest.param(Quirks(keeps_first_chunk_only=True, stale_range=True, patch_status=201), id="ECR"),
    ],
)
def test_very_large_blob_is_sent_in_one_where_chunks_do_not_work(
    start: Start, weights: Path, tmp_path: Path, quirks: Quirks
) -> None:
    server = start(quirks)
    reference = fresh(server.host, "x")
    oci.push(weights, reference, access=quick())
    assert blob_patches(server)[-1] > 12_000_000
    assert len(blob_patches(server)) <= 3
    assert files(oci.pull(reference, tmp_path / "back", access=quick())) == files(weights)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("quirk", [{"range_of_body": True}, {"range_prefix": "bytes="}])
def test_chunks_continue_where_the_range_is_written_otherwise(
    start: Start, weights: Path, quirk: dict[str, object]
) -> None:
    server = start(**quirk)
    oci.push(weights, fresh(server.host, "x"), access=quick())
    assert sum(blob_patches(server)) < 12_100_000


@pytest.mark.usefixtures("chunked")
def test_chunks_are_as_long_as_the_registry_wants(start: Start, weights: Path) -> None:
    server = start(chunk_least=3_000_000)
    oci.push(weights, fresh(server.host, "x"), access=quick())
    assert blob_patches(server)[:2] == [3_000_000, 3_000_000]


@pytest.mark.parametrize(
    ("status", "sent"), [(204, 8_000_000), (404, 12_000_000), (405, 12_000_000), (500, 12_000_000)]
)
def test_upload_of_an_earlier_process_is_continued_or_begun_anew(
    start: Start, weights: Path, tmp_path: Path, status: int, sent: int
) -> None:
    # what is on its way as the first push gives up is not kept: it would come behind what is put there
    server = start(patch_refusal=503, keeps_partial=False)
    reference, sessions = fresh(server.host, "x"), tmp_path / "sessions"
    access = quick(sessions=sessions, attempts=1)
    with pytest.raises(TransientError, match="503"):
        oci.push(weights, reference, access=access)
    (kept,) = sessions.iterdir()
    server.content.uploads[kept.read_text().rpartition("/")[2]] += weights_layer(weights)[:4_000_000]
    server.quirks = Quirks(status=status, keeps_partial=False)
    server.seen.clear()
    oci.push(weights, reference, access=access)
    assert sent < max(blob_patches(server)) < sent + 100_000
    assert not list(sessions.iterdir())


def weights_layer(folder: Path) -> bytes:
    """The layer that a push makes of the weights."""
    with tempfile.TemporaryDirectory() as scratch:
        layers = build(folder, Path(scratch)).blobs
        return max((b"".join(read_all(blob.open())) for blob in layers), key=len)


def test_redirect_without_an_address_is_no_success(start: Start, weights: Path) -> None:
    with pytest.raises(RegistryError, match="304"):
        oci.push(weights, fresh(start(patch_status=304).host, "x"), access=quick())


def test_body_that_is_too_large_is_sent_in_chunks(start: Start, weights: Path, tmp_path: Path) -> None:
    server = start(body_limit=700_000)
    reference = fresh(server.host, "x")
    oci.push(weights, reference, access=quick())
    assert blob_patches(server)[-1] <= 700_000
    assert files(oci.pull(reference, tmp_path / "back", access=quick())) == files(weights)


def test_body_that_breaks_the_connection_is_sent_in_chunks(start: Start, weights: Path) -> None:
    server = start(body_limit=6_000_000, body_limit_cuts=True)
    oci.push(weights, fresh(server.host, "x"), access=quick())
    assert 100_000 < max(blob_patches(server)) <= 6_000_000


@pytest.mark.parametrize("status", [405, 501])
def test_registry_without_patch_gets_the_blob_with_the_put(start: Start, weights: Path, status: int) -> None:
    server = start(patch_refusal=status)
    oci.push(weights, fresh(server.host, "x"), access=quick())
    assert max(seen.length for seen in server.find("PUT")) > 12_000_000


def test_what_no_registry_takes_ends_with_its_reason(start: Start, weights: Path) -> None:
    with pytest.raises(RegistryError, match=r"413.*body too large"):
        oci.push(weights, fresh(start(body_limit=1000).host, "x"), access=quick())
    with pytest.raises(RegistryError, match=r"400.*no PATCH"):
        oci.push(weights, fresh(start(patch_refusal=400).host, "x"), access=quick())


def test_azure_registry_gets_chunks_that_it_takes(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, which leads to this machine here."""
    look_up = socket.getaddrinfo

    def here(host: str, *arguments: object, **options: object) -> object:
        return look_up("127.0.0.1" if host == "team.azurecr.io" else host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", here)
    server = start(body_limit=20_000_000, strict_azure=True)
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(random.Random(1).randbytes(45_000_000))
    reference = fresh(f"team.azurecr.io:{server.port}", "x")
    access = quick(insecure=True)
    oci.check_push(reference, access=access)
    oci.push(folder, reference, access=access)
    assert blob_patches(server)[1:3] == [16 << 20, 16 << 20]
    assert all(seen.headers["Content-Range"] for seen in server.find("PATCH")), (
        "Azure's documentation has a Content-Range on every PATCH"
    )


@pytest.mark.parametrize("quirk", [{"patch_refusal": 400}, {"patch_refusal": 403}, {"body_limit": 1000}])
def test_preflight_finds_what_the_push_would_meet(start: Start, quirk: dict[str, int]) -> None:
    server = start(**quirk)
    with pytest.raises(RegistryError):
        oci.check_push(fresh(server.host, "x"), access=quick())


def test_preflight_sends_more_than_4_mib_and_leaves_nothing(start: Start) -> None:
    server = start()
    oci.check_push(fresh(server.host, "x"), access=quick())
    assert blob_patches(server) == [upload.REHEARSAL_BYTES]
    assert upload.REHEARSAL_BYTES > 4 << 20
    assert not server.content.uploads
    assert not server.content.blobs


def test_preflight_says_when_the_tag_exists(
    start: Start, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start()
    reference = fresh(server.host, "x")
    oci.check_push(reference, access=quick())
    assert not caplog.messages
    digest = oci.push(weights, reference, access=quick())
    oci.check_push(reference, access=quick())
    assert any(str(reference) in line and digest in line for line in caplog.messages)
