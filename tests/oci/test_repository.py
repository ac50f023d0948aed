"""Push and pull against real registries: open, htpasswd, TLS, and tokens as Azure does it."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError, TransientError
from runtime.oci import Access
from tests.faults.registry import Answer, FaultyRegistry
from tests.oci.conftest import (
    AzureLike,
    Started,
    TlsRegistry,
    docker_config,
    files,
    fresh,
    needs,
    quick,
    write_large,
)

pytestmark = pytest.mark.system


@dataclass
class Place:
    host: str
    access: Access
    skopeo: list[str]


@pytest.fixture(params=["open", "htpasswd", "tls", "tokens"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    plain = ["--tls-verify=false"]
    if request.param == "open":
        started: Started = request.getfixturevalue("open_registry")
        return Place(started.host, quick(), plain)
    if request.param == "htpasswd":
        started = request.getfixturevalue("password_registry")
        login = docker_config(tmp_path / "docker/config.json", started.host)
        return Place(started.host, quick(login), [*plain, "--creds=pusher:s3cret"])
    if request.param == "tls":
        tls: TlsRegistry = request.getfixturevalue("tls_registry")
        certificates = tmp_path / "certificates"
        certificates.mkdir()
        (certificates / "ca.crt").write_bytes(tls.ca_file.read_bytes())
        return Place(tls.started.host, quick(ca_file=tls.ca_file), [f"--cert-dir={certificates}"])
    azure: AzureLike = request.getfixturevalue("azure")
    login = docker_config(tmp_path / "docker/config.json", azure.host)
    return Place(azure.host, quick(login), [*plain, "--creds=pusher:s3cret"])


@needs("skopeo", "umoci")
def test_push_and_pull_through_every_kind_of_registry(place: Place, adapter: Path, tmp_path: Path) -> None:
    reference = fresh(place.host, "adapters/phi-3")
    oci.check_push(reference, access=place.access)
    digest = oci.push(adapter, reference, annotations={"sh.kaito.model.name": "phi-3"}, access=place.access)
    assert (
        oci.push(adapter, oci.parse(f"oci:{tmp_path}/layout"), annotations={"sh.kaito.model.name": "phi-3"})
        == digest
    )

    back = oci.pull(reference, tmp_path / "back", access=place.access)
    assert files(back) == files(adapter)
    by_digest = oci.parse(f"{reference.registry}/{reference.repository}@{digest}")
    assert files(oci.pull(by_digest, tmp_path / "by-digest", access=place.access)) == files(adapter)

    inspected = subprocess.check_output(["skopeo", "inspect", *place.skopeo, f"docker://{reference}"])
    assert json.loads(inspected)["Digest"] == digest
    # What the controller's puller does: copy with skopeo, unpack every layer in order.
    source = [option.replace("--", "--src-", 1) for option in place.skopeo]
    copy = ["skopeo", "copy", "-q", *source, f"docker://{reference}", f"oci:{tmp_path}/copied:v1"]
    subprocess.run(copy, check=True)
    unpack = ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/copied:v1", tmp_path / "bundle"]
    subprocess.run(unpack, check=True)
    assert files(tmp_path / "bundle/rootfs/data") == files(adapter)


def test_second_push_sends_nothing(azure: AzureLike, adapter: Path, tmp_path: Path) -> None:
    access = quick(docker_config(tmp_path / "config.json", azure.host))
    reference = fresh(azure.host, "adapter")
    first = oci.push(adapter, reference, access=access)
    azure.front.seen.clear()
    assert oci.push(adapter, reference, access=access) == first
    assert azure.front.count("POST|PUT|PATCH", "/v2/") == 0


def test_new_tag_of_a_pushed_image_sends_the_manifest_alone(
    azure: AzureLike, adapter: Path, tmp_path: Path
) -> None:
    access = quick(docker_config(tmp_path / "config.json", azure.host))
    reference = fresh(azure.host, "adapter")
    digest = oci.push(adapter, reference, access=access)
    azure.front.seen.clear()
    assert oci.push(adapter, reference.tagged("v2"), access=access) == digest
    assert azure.front.sent() == 0


def test_preflight_leaves_no_upload_behind(azure: AzureLike, tmp_path: Path) -> None:
    access = quick(docker_config(tmp_path / "config.json", azure.host))
    oci.check_push(fresh(azure.host, "adapter"), access=access)
    assert azure.front.count("POST", "/blobs/uploads/") == 2  # the first is the challenge
    assert [s.status for s in azure.front.seen if s.method == "DELETE"][-1:] == [204]
    assert azure.front.count("PUT") == 0


def test_untrusted_certificate_is_reported_at_once(
    tls_registry: TlsRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with pytest.raises(RegistryError, match="certificate is not trusted"):
        oci.check_push(fresh(tls_registry.started.host, "a"), access=quick())
    oci.check_push(fresh(tls_registry.started.host, "a"), access=quick(insecure=True))


def test_missing_image_is_named(open_registry: Started, tmp_path: Path) -> None:
    reference = fresh(open_registry.host, "never-pushed")
    with pytest.raises(RegistryError, match=r"never-pushed.*no such image"):
        oci.pull(reference, tmp_path / "back", access=quick())


def test_inspect_tells_digest_kind_and_annotations(open_registry: Started, adapter: Path) -> None:
    reference = fresh(open_registry.host, "adapter")
    digest = oci.push(adapter, reference, annotations={"sh.kaito.model.name": "phi-3"}, access=quick())
    info = oci.inspect(reference, quick())
    assert (info.digest, info.manifest.kind) == (digest, "image")
    assert info.manifest.annotations == {"sh.kaito.model.name": "phi-3"}


@pytest.fixture
def proxied(faulty: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> FaultyRegistry:
    """The proxy named in the environment, for every host."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{faulty.host}")
    return faulty


def test_proxy_of_the_environment_is_used(proxied: FaultyRegistry, adapter: Path) -> None:
    oci.push(adapter, fresh("registry.internal:5000", "adapter"), access=quick(insecure=True))
    assert set(proxied.proxied) == {"registry.internal:5000"}


def test_plain_http_is_never_tried_for_a_distant_registry(proxied: FaultyRegistry) -> None:
    with pytest.raises(TransientError):
        oci.check_push(fresh("registry.internal:5000", "adapter"), access=quick(attempts=2))
    assert not proxied.proxied


def test_cache_keeps_blobs_by_digest(open_registry: Started, adapter: Path, tmp_path: Path) -> None:
    reference = fresh(open_registry.host, "adapter")
    oci.push(adapter, reference, access=quick())
    access = quick(cache=tmp_path / "cache")
    oci.pull(reference, tmp_path / "one", access=access)
    repositories = open_registry.folder / "data/docker/registry/v2/repositories"
    shutil.rmtree(repositories / reference.repository / "_layers")  # it no longer gives out the blobs
    assert files(oci.pull(reference, tmp_path / "two", access=access)) == files(adapter)


def test_pulled_folder_of_the_same_image_is_kept(
    open_registry: Started, adapter: Path, tmp_path: Path
) -> None:
    reference = fresh(open_registry.host, "adapter")
    oci.push(adapter, reference, access=quick())
    back = oci.pull(reference, tmp_path / "back", access=quick())
    before = (back / "adapter_model.safetensors").stat().st_ino
    oci.pull(reference, back, access=quick())
    assert (back / "adapter_model.safetensors").stat().st_ino == before


MEASURED = """
import resource, sys
from pathlib import Path
from runtime import oci
import runtime.oci.repository

rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "push":
    oci.push(Path(sys.argv[2]), oci.parse(sys.argv[3]))
else:
    oci.pull(oci.parse(sys.argv[3]), Path(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rest) // 1024)
"""


@pytest.mark.slow
def test_push_and_pull_take_constant_memory(open_registry: Started, tmp_path: Path) -> None:
    """300 MB both ways, below 64 MiB over the process at rest."""
    folder = tmp_path / "big"
    folder.mkdir()
    write_large(folder / "adapter_model.safetensors", 300, seed=3)
    reference = fresh(open_registry.host, "big")
    for way, place in (("push", folder), ("pull", tmp_path / "back")):
        command = [sys.executable, "-c", MEASURED, way, str(place), str(reference)]
        assert int(subprocess.check_output(command)) < 64
    assert files(tmp_path / "back") == files(folder)


def test_processes_that_pull_into_one_folder_take_turns(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path
) -> None:
    """As the ranks of a job do: one downloads, the others find it done."""
    reference = fresh(faulty.host, "adapter")
    oci.push(adapter, reference, access=quick())
    faulty.seen.clear()
    command = [sys.executable, "-m", "runtime", "pull", str(reference), str(tmp_path / "back")]
    jobs = [subprocess.Popen(command) for _ in range(3)]
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    assert files(tmp_path / "back") == files(adapter)
    assert faulty.count("GET", "/blobs/") == 3  # two layers and the configuration, once


@pytest.mark.parametrize("part", ["manifest", "error message", "token", "error message of a blob"])
def test_a_body_that_does_not_end_is_refused_at_4_mib(
    faulty: FaultyRegistry, adapter: Path, tmp_path: Path, part: str
) -> None:
    reference = fresh(faulty.host, "a")
    endless = b'{"token":"' + b"a" * (5 << 20)
    if part == "error message of a blob":
        oci.push(adapter, reference, access=quick())
    answers = {
        "manifest": ("/v2/", 200, {"Content-Type": "application/json"}),
        "error message": ("/v2/", 400, {}),
        "error message of a blob": (f"/v2/{reference.repository}/blobs/", 400, {}),
        "token": ("/v2/", 401, {"WWW-Authenticate": f'Bearer realm="http://{faulty.host}/token"'}),
    }
    path, status, headers = answers[part]
    faulty.routes = {path: lambda *_: (status, headers, b"" if part == "token" else endless)}
    faulty.routes["/token"] = lambda *_: (200, {}, endless)
    with pytest.raises(RegistryError, match="more than 4 MiB"):
        oci.pull(reference, tmp_path / "back", access=quick())


@pytest.mark.parametrize("data", [b"[" * 100_000, b"[]", b'{"mediaType": {}}', b"\xff", b""])
def test_a_manifest_that_is_none_is_one_error(faulty: FaultyRegistry, tmp_path: Path, data: bytes) -> None:
    reference = fresh(faulty.host, "a")
    faulty.routes["/v2/"] = lambda *_: (200, {"Content-Type": "application/json"}, data)
    assert oci.checkpoints.find(reference, job="a", access=quick()) == []
    with pytest.raises(RegistryError, match="not an image manifest"):
        oci.pull(reference, tmp_path / "back", access=quick())


def test_preflight_needs_no_right_to_delete(azure: AzureLike, tmp_path: Path) -> None:
    """A token server that refuses all of a request of which one action is not permitted."""
    answer = azure.tokens.answer

    def strict(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return (403, {}, b"{}") if "delete" in path else answer(method, path, headers, body)

    routes = dict(azure.front.routes)
    azure.front.routes["/oauth2/"] = strict
    try:
        access = quick(docker_config(tmp_path / "config.json", azure.host))
        oci.check_push(fresh(azure.host, "adapter"), access=access)
    finally:
        azure.front.routes = routes
