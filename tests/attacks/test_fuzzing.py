"""Thousands of images, answers of registries and data files that nobody would write: a Failure, or a result.

The examples are the same in every run, so that a failure is one for everybody.
"""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import hardware
from runtime.errors import Failure
from runtime.net import Retries
from runtime.oci import challenges, extract, manifests, tokens
from runtime.oci.access import Access
from runtime.oci.credentials import find
from runtime.oci.extract import LayerBlob
from runtime.oci.layout import Layout
from runtime.oci.selection import select
from runtime.oci.store import StoredManifest
from runtime.oci.tokens import LoginRefusedError, TokenRequest
from runtime.oci.transport import Transport
from runtime.oci.tree import ImageTree
from tests.oci.conftest import archive, special

pytestmark = pytest.mark.long

MOST_GROWN = 128 << 20
"""Of a process that has had all examples."""

many = settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def flat_memory() -> Iterator[None]:
    before = hardware.status_bytes("VmRSS")
    yield
    assert hardware.status_bytes("VmRSS") - before < MOST_GROWN


# -- Damage -----------------------------------------------------------------------------------------------


bad_bytes = st.sampled_from((b"\xff", b"\0", b"\x80", b"\xff\xff\xff\x7f", b"9" * 8, b"-1"))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, *, most: int = 4) -> bytes:
    """Return `whole` with a few bytes replaced, a part cut out or repeated, or its end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        new = draw(
            st.sampled_from((b"\xff", b"\0", b"\x80", b"\xff\xff\xff\x7f", b"9" * 8, b"-1"))
            | st.binary(max_size=6)
        )
        kind = draw(st.sampled_from(("replace", "insert", "repeat", "cut", "end")))
        if kind == "replace":
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = new
        elif kind == "repeat":
            data[at:at] = data[at : at + 512]
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 600))]
        else:
            del data[at:]
    return bytes(data)


names = st.sampled_from(
    [
        "data/a",
        "data",
        "data/",
        "/data/a",
        "./data/b",
        "data/../x",
        "../x",
        "",
        "data/.wh.a",
        "data/.wh..wh..opq",
        "data/a/b",
        "data/l/x",
        "data/" + "n" * 300,
        "data/" + "d/" * 200,
        "data/\u202eexe",
        "data/a\nb",
    ]
)
kinds = st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"Z"])


@st.composite
def layers(draw: st.DrawFn) -> bytes:
    """Return a tar archive of odd entries, damaged and compressed or not."""
    entries: list[Any] = []
    for _ in range(draw(st.integers(0, 5))):
        name = draw(names)
        if draw(st.booleans()):
            entries.append((name, draw(st.binary(max_size=40))))
        else:
            entries.append(special(name, draw(kinds), draw(names)))
    data = archive(*entries)
    if draw(st.booleans()):
        data = draw(damaged(data))
    return gzip.compress(data, 1) if draw(st.booleans()) else data


@many
@given(parts=st.lists(layers(), min_size=1, max_size=3))
def test_layers(parts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        root, target = Path(folder), Path(folder) / "target"
        target.mkdir()
        tree, blobs = ImageTree(), []
        try:
            for number, data in enumerate(parts):
                blob = root / f"layer{number}"
                blob.write_bytes(data)
                blobs.append(LayerBlob(blob, f"sha256:{hashlib.sha256(data).hexdigest()}"))
                extract.read_layer(tree, blobs[-1], number)
            extract.write(select(tree, "data", "IMAGE"), blobs, target)
        except Failure as failure:
            assert "\n" not in str(failure)
            return
        assert all(path.resolve().is_relative_to(target.resolve()) for path in target.rglob("*"))


# -- Manifests --------------------------------------------------------------------------------------------

words = st.sampled_from(
    [
        "sha256:" + "0" * 64,
        "sha256:0",
        "",
        "application/vnd.oci.image.manifest.v1+json",
        "linux",
        "amd64",
        "\ud800",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.index.v1+json",
    ]
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words | st.text(max_size=8)
keys = st.sampled_from(
    [
        "schemaVersion",
        "mediaType",
        "config",
        "layers",
        "digest",
        "size",
        "annotations",
        "manifests",
        "platform",
        "os",
        "architecture",
        "artifactType",
        "rootfs",
        "diff_ids",
        "urls",
        "data",
        "subject",
    ]
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=5,
)
descriptors = st.fixed_dictionaries(
    {"mediaType": words, "digest": words, "size": st.integers(-1, 2**63) | scalars},
    optional={"annotations": documents, "platform": documents, "urls": documents},
)
plausible = st.fixed_dictionaries(
    {
        "schemaVersion": st.just(2) | scalars,
        "config": descriptors | documents,
        "layers": st.lists(descriptors, max_size=3),
    },
    optional={
        "mediaType": words,
        "annotations": documents,
        "artifactType": words,
        "manifests": st.lists(descriptors),
    },
)


def failures(*calls: Callable[[], object]) -> None:
    """Have each call end well, or in a Failure of one line."""
    for call in calls:
        try:
            call()
        except Failure as failure:
            assert "\n" not in str(failure)


@many
@given(document=documents | plausible, media_type=words, raw=st.none() | st.binary(max_size=40))
def test_manifests(
    document: object, media_type: str, raw: bytes | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = json.dumps(document).encode() if raw is None else raw
    manifest = StoredManifest(data, media_type)
    root = tmp_path_factory.getbasetemp() / "fuzzed-layout"
    (root / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (root / "index.json").write_bytes(data)
    layout = Layout(root)
    failures(
        lambda: manifests.read(manifest, "IMAGE"),
        lambda: manifests.choose_platform(manifest, "amd64", "IMAGE"),
        lambda: manifests.diff_ids(root / "index.json", "IMAGE"),
        layout.find_only,
        layout.tags,
        lambda: layout.find("v1"),
    )


# -- Registries' words --------------------------------------------------------------------------------------


class Answering:
    """A transport whose token server gives one answer."""

    host = "registry.example"

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._response = requests.Response()
        self._response.status_code = status
        self._response.headers.update(headers)
        self._response.raw = io.BytesIO(body)

    def retries(self, what: str) -> Retries:
        return Retries(what, attempts=1, backoff_s=0)

    def log_in_at(self, *_: object, **__: object) -> requests.Response:
        return self._response


token_fields = st.sampled_from(
    ["token", "access_token", "expires_in", "issued_at", "refresh_token", "errors"]
)
tokens_ = st.sampled_from(
    ["a.b.c", "eyJhbGciOiJub25lIn0.eyJleHAiOjF9.x", "a b", "a\r\nX: y", "", "é", ".", "a" * 9000]
)
replies = st.dictionaries(token_fields, tokens_ | scalars | documents, max_size=4)
challenge_parts = st.sampled_from(
    [
        "Bearer ",
        "Basic ",
        'realm="',
        '"',
        ",",
        "=",
        "service=",
        "scope",
        "\\",
        " ",
        "\x00",
        "https://[",
        "é",
        "Negotiate",
    ]
)


@many
@given(
    reply=replies | documents,
    raw=st.none() | st.binary(max_size=40),
    status=st.sampled_from([200, 200, 200, 201, 400, 401, 403, 404, 429, 500, 503]),
    header=st.lists(challenge_parts, max_size=12).map("".join),
)
def test_tokens_and_challenges(reply: object, raw: bytes | None, status: int, header: str) -> None:
    body = json.dumps(reply).encode() if raw is None else raw
    transport = cast(Transport, Answering(status, body, {"Retry-After": header[:20]}))
    for challenge in [*challenges.parse(header), challenges.Challenge("bearer", "https://r.example/token")]:
        request = TokenRequest(
            challenge.realm or "https://r.example", challenge.service, ("repository:a:pull",), None
        )
        try:
            token = tokens.fetch(transport, request)
        except (Failure, LoginRefusedError) as refused:
            assert "\n" not in str(refused)
        else:
            assert token.header.isascii()
            assert token.header.isprintable()


entry_fields = st.sampled_from(["auth", "username", "password", "identitytoken", "registrytoken"])
entries = st.dictionaries(entry_fields, scalars | st.sampled_from(["OnA=", "dTpw", "====", "é"]), max_size=4)
hosts = st.sampled_from(["registry.example", "https://registry.example/v1/", "*", ""])
sections = st.sampled_from(["auths", "credsStore", "credHelpers", "x"])
configs = st.dictionaries(sections, documents | st.dictionaries(hosts, documents | entries), max_size=3)


@settings(many, max_examples=500)
@given(document=configs, raw=st.none() | st.binary(max_size=40))
def test_credential_files(
    document: object, raw: bytes | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed-config.json"
    path.write_bytes(json.dumps(document).encode() if raw is None else raw)
    failures(lambda: list(find("registry.example", "a/b", Access(files=(path,)), skipped=[])))


# -- Data files -------------------------------------------------------------------------------------------


class Reader:
    """A process that reads files one after another: what crashes it crashes no test."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.attacks.reader_process", str(32 << 20), "fail", "-"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def read(self, path: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"reading {path} ended the process with {self._process.wait(60)}"
        found: dict[str, Any] = json.loads(answer)
        return found


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader() as process:
        yield process


ROWS = pa.table({"text": [f"row {n}" for n in range(20)], "x": [[{"a": n}] * 3 for n in range(20)]})
TEXTS = [{"instruction": f"é {n}", "output": "b\nc", "tags": ["x", {"y": None}]} for n in range(5)]


def columnar(name: str) -> bytes:
    sink = io.BytesIO()
    if name == "parquet":
        pq.write_table(ROWS, sink, compression="zstd")
    else:
        with pa.ipc.new_file(sink, ROWS.schema) as file:
            file.write_table(ROWS)
    return sink.getvalue()


WHOLE = {
    "parquet": columnar("parquet"),
    "arrow": columnar("arrow"),
    "jsonl": "".join(json.dumps(row) + "\n" for row in TEXTS).encode(),
    "json": json.dumps(TEXTS).encode(),
    "csv": b'instruction,output\n"a ""q"" ",b\n' + b"x,y\n" * 5,
    "jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 30, 1),
}


@pytest.mark.parametrize("suffix", WHOLE)
def test_data_files(reader: Reader, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"

    @settings(many, max_examples=2000 // len(WHOLE))
    @given(data=damaged(WHOLE[suffix]))
    def every(data: bytes) -> None:
        path.write_bytes(data)
        found = reader.read(path)
        assert found["outcome"] in {"read", "DataError", "DataLimitError", "CapacityError"}, found
        assert "\n" not in found["text"]

    every()
    assert reader.read(path)["grown"] < 4 * MOST_GROWN
