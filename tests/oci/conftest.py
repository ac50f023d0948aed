"""An adapter-like folder, and real registries: open, htpasswd, TLS, and one that does as Azure's."""

import base64
import io
import json
import random
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime import oci
from runtime.oci import Access, Reference, images, parse
from runtime.oci.blobs import Blob, BlobParts, from_bytes
from runtime.oci.image import CONFIG, INDEX, MANIFEST, assemble
from runtime.oci.store import StoredManifest
from tests.faults.quirky_registry import Quirks, QuirkyRegistry
from tests.faults.registry import FaultyRegistry
from tests.faults.registry_tokens import TokenServer, make_certificate


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as tuning leaves it: configuration, weights that do not compress, a subfolder."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(random.Random(7).randbytes(9_000_000))
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {f"w{n}": n for n in range(2000)}}})
    )
    (folder / "report").mkdir()
    (folder / "report/answers.md").write_text("# answers\n" * 50)
    return folder


@pytest.fixture(scope="session")
def registry_program() -> str:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("not installed: docker-registry")
    return program


class Started:
    """A docker-registry process on a free port."""

    def __init__(self, program: str, folder: Path, *, auth: object = None, tls: object = None):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        storage = {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}}
        http = {"addr": f"127.0.0.1:{self.port}", "relativeurls": True, "secret": "x"}
        config = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": storage,
        }
        config |= {"http": http | ({"tls": tls} if tls else {})} | ({"auth": auth} if auth else {})
        (folder / "config.yml").write_text(json.dumps(config))
        self.folder = folder
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="session")
def open_registry(registry_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(registry_program, tmp_path_factory.mktemp("open"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def password_registry(registry_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    if shutil.which("htpasswd") is None:
        pytest.skip("not installed: htpasswd")
    folder = tmp_path_factory.mktemp("password")
    subprocess.run(
        ["htpasswd", "-Bbc", folder / "users", "pusher", "s3cret"], check=True, capture_output=True
    )
    auth = {"htpasswd": {"realm": "test", "path": str(folder / "users")}}
    started = Started(registry_program, folder, auth=auth)
    yield started
    started.stop()


@dataclass
class TlsRegistry:
    started: Started
    ca_file: Path


@pytest.fixture(scope="session")
def tls_registry(registry_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsRegistry]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = make_certificate(folder, "registry")
    tls = {"certificate": str(certificate), "key": str(key)}
    started = Started(registry_program, folder, tls=tls)
    yield TlsRegistry(started, certificate)
    started.stop()


@pytest.fixture
def faulty(open_registry: Started) -> Iterator[FaultyRegistry]:
    """The open registry behind a proxy that a test can tell what to break."""
    server = FaultyRegistry()
    server.upstream = open_registry.port
    yield server
    server.shutdown()
    server.server_close()


Start = Callable[..., QuirkyRegistry]
"""Starts a registry in memory with these quirks."""


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[QuirkyRegistry] = []

    def make(quirks: Quirks | None = None, **each: object) -> QuirkyRegistry:
        started.append(QuirkyRegistry(quirks or Quirks(**each)))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for server in started:
        server.stop()


@dataclass
class AzureLike:
    front: FaultyRegistry
    tokens: TokenServer
    started: Started

    @property
    def host(self) -> str:
        return self.front.host


@pytest.fixture(scope="module")
def _azure(registry_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureLike]:
    folder = tmp_path_factory.mktemp("azure")
    tokens = TokenServer(folder)
    front = FaultyRegistry()
    front.routes = {"/oauth2/": tokens.answer, "/tenant-1/": tokens.answer, "/metadata/": tokens.answer}
    realm = f"http://{front.host}/oauth2/token"
    auth = {"token": {"realm": realm, "service": tokens.service, "issuer": tokens.issuer}}
    auth["token"]["rootcertbundle"] = str(tokens.certificate)
    started = Started(registry_program, folder, auth=auth)
    front.upstream = started.port
    yield AzureLike(front, tokens, started)
    started.stop()
    front.shutdown()
    front.server_close()


@pytest.fixture
def azure(_azure: AzureLike) -> AzureLike:
    """A registry that wants tokens, takes bodies up to 20 MB and sits on one port with its token server."""
    _azure.front.faults.clear()
    _azure.front.seen.clear()
    _azure.front.body_limit = 20_000_000
    tokens = _azure.tokens
    tokens.issued.clear()
    tokens.grants.clear()
    tokens.life_s, tokens.age_s, tokens.federated = 3600, 0, "federated-1"
    tokens.refresh_tokens = {"refresh-ok"}
    return _azure


def docker_config(path: Path, host: str, user: str = "pusher", password: str = "s3cret") -> Path:
    """Write a Docker config.json with one login."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


def quick(*files: Path, **options: object) -> Access:
    """Access that waits little, so that faults cost a test no time."""
    return Access(files=files, backoff_s=0.01, read_timeout_s=5, **options)  # type: ignore[arg-type]


def write_large(path: Path, megabytes: int, *, seed: int) -> None:
    """Write blocks of a megabyte that differ from each other and do not compress."""
    block = random.Random(seed).randbytes(1 << 20)
    with path.open("wb") as file:
        for number in range(megabytes):
            file.write(number.to_bytes(4, "big") + block[4:])


def fresh(host: str, name: str) -> Reference:
    """A repository no other test uses."""
    return parse(f"{host}/{name}-{random.SystemRandom().getrandbits(40):x}:v1")


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".oci.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def archive(*entries: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def store(tmp_path: Path, layers: list[Blob], config: dict[str, object] | None = None) -> oci.Reference:
    """Put an image of these layers into a layout."""
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    blob = from_bytes(json.dumps(config or {}).encode(), CONFIG)
    oci.push_image(lambda: assemble(layers, blob, annotations={}), reference)
    return reference


def titled(data: bytes, media_type: str, **notes: str) -> BlobParts:
    blob = from_bytes(data, media_type)
    blob.descriptor.annotations.update({key.replace("__", "."): value for key, value in notes.items()})
    return blob


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def indexed(reference: oci.Reference, digest: str) -> str:
    """Let the reference's tag name an index with the image `digest` alone; return the index's digest."""
    entry = {"mediaType": MANIFEST, "digest": digest, "size": 1}
    index = StoredManifest(json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(), INDEX)
    store = images.open_store(reference, quick())
    with store.writing():
        store.put_manifest(index, reference.selector)
    store.close()
    return index.digest
