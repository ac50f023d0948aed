"""Manifests and indexes: the right one is chosen, every strange one is named."""

import copy
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from runtime import oci
from runtime.errors import RegistryError
from runtime.oci import manifests
from runtime.oci.blobs import from_bytes
from runtime.oci.image import CONFIG, INDEX, LAYER_TAR, MANIFEST, assemble
from runtime.oci.layout import Layout
from runtime.oci.store import StoredManifest
from tests.oci.conftest import archive, files

HERE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
OTHER = "arm64" if HERE == "amd64" else "amd64"
DIGEST = "sha256:" + "ab" * 32
GOOD: dict[str, Any] = {
    "schemaVersion": 2,
    "config": {"mediaType": CONFIG, "digest": DIGEST, "size": 2},
    "layers": [{"mediaType": LAYER_TAR, "digest": DIGEST, "size": 3}],
}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def image(tmp_path: Path, content: str) -> dict[str, Any]:
    """Put an image into the layout; return its entry for an index."""
    layer = from_bytes(archive(("data/content", content.encode())), LAYER_TAR)
    made = assemble([layer], from_bytes(b"{}", CONFIG), annotations={})
    oci.push_image(lambda: made, oci.parse(f"oci:{tmp_path}/layout:{content}"))
    return {"mediaType": made.media_type, "digest": made.digest, "size": len(made.manifest)}


def index(
    tmp_path: Path, entries: list[dict[str, Any]], tag: str = "all", *, typed: bool = True
) -> dict[str, Any]:
    """Put an index of `entries` into the layout; return its entry for another one."""
    kind = {"mediaType": INDEX} if typed else {}
    stored = StoredManifest(json.dumps({"schemaVersion": 2, **kind, "manifests": entries}).encode(),
                            INDEX if typed else "application/json")  # fmt: skip
    Layout(tmp_path / "layout").put_manifest(stored, tag)
    return {**kind, "digest": stored.digest, "size": len(stored.data)}


def on(machine: str, entry: dict[str, Any], os: str = "linux") -> dict[str, Any]:
    return entry | {"platform": {"os": os, "architecture": machine}}


def pulled(tmp_path: Path) -> bytes:
    return files(oci.pull(oci.parse(f"oci:{tmp_path}/layout:all"), tmp_path / "back"))["content"]


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "typeless"])
@pytest.mark.parametrize("nested", [0, 2])
def test_index_gives_the_image_of_this_machine(tmp_path: Path, nested: int, typed: bool) -> None:
    attestation = on("unknown", image(tmp_path, "attestation"), "unknown")
    by_docker = image(tmp_path, "docker") | {
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"}
    }
    entries = [attestation, by_docker, on(HERE, image(tmp_path, "windows"), "windows"),
               on(OTHER, image(tmp_path, "other")), on(HERE, image(tmp_path, "here"))]  # fmt: skip
    for number in range(nested):
        entries = [index(tmp_path, entries, f"nested{number}", typed=typed)]
    index(tmp_path, entries, typed=typed)
    assert pulled(tmp_path) == b"here"


def test_an_image_for_another_machine_is_better_than_none_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index(tmp_path, [on(OTHER, image(tmp_path, "other")), on("s390x", image(tmp_path, "large"))])
    assert pulled(tmp_path) == b"other"
    assert f"has no image for linux/{HERE}, taking that for linux/{OTHER}" in caplog.text


def test_an_image_for_no_machine_in_particular_comes_before_another_machines(tmp_path: Path) -> None:
    index(tmp_path, [on(OTHER, image(tmp_path, "other")), image(tmp_path, "any")])
    assert pulled(tmp_path) == b"any"


def test_indexes_without_end_are_refused(tmp_path: Path) -> None:
    entry = image(tmp_path, "deep")
    for number in range(6):
        entry = index(tmp_path, [entry], f"level{number}")
    index(tmp_path, [entry])
    with pytest.raises(RegistryError, match="more than 4 indexes"):
        pulled(tmp_path)


@pytest.mark.parametrize(
    "entries", [[], [1], [{}], [{"digest": "x", "platform": 3}], "text",
                [{"platform": {"os": "unknown", "architecture": "unknown"}}]],
)  # fmt: skip
def test_strange_index_is_an_error(tmp_path: Path, layout: Layout, entries: object) -> None:
    with layout.writing():
        layout.put_manifest(StoredManifest(json.dumps({"manifests": entries}).encode(), INDEX), "all")
    with pytest.raises(RegistryError, match="image index"):
        pulled(tmp_path)


def read(document: object, media_type: str = MANIFEST) -> manifests.ImageManifest:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return manifests.read(StoredManifest(data, media_type), "IMAGE")


def changed(**values: Any) -> dict[str, Any]:
    """The good manifest, with values set by `part__field`; of its first layer, its config or itself."""
    document = copy.deepcopy(GOOD)
    for name, value in values.items():
        part, _, key = name.rpartition("__")
        owner = {"": document, "config": document["config"], "layer": document["layers"][0]}[part]
        owner[key] = value
    return document


def test_a_good_manifest_is_read() -> None:
    assert read(GOOD).kind == "image"
    assert read(changed(layer__mediaType=None)).size == 3


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"[]", "not an image manifest"),
        (b"{}", "not an image manifest"),
        (b"<html>", "not an image manifest"),
        (b"\xff\xfe", "not an image manifest"),
        (b"[" * 100_000, "not an image manifest"),
        (b'{"config":{},"layers":[]}', "not an image manifest"),
        (b'{"config":1,"layers":2}', "not an image manifest"),
        (changed(annotations=[1]), "not an image manifest"),
        (changed(layers=None), "not an image manifest"),
        (changed(schemaVersion=1), "schema 1"),
        (changed(manifests=[]), "a manifest and an index at once"),
        (changed(layer__digest="sha256:../../../etc/passwd"), "expected sha256: and 64 hex digits"),
        (changed(layer__digest="sha512:" + "a" * 128), "expected sha256: and 64 hex digits"),
        (changed(layer__digest=7), "expected sha256: and 64 hex digits"),
        (changed(layer__size=-1), "size -1"),
        (changed(layer__size="3"), "size 3"),
        (changed(layer__size=True), "size True"),
        (changed(config__size=5 << 20), "configuration of 5242880 bytes"),
        (changed(layers=[GOOD["layers"][0]] * 501), "501 layers"),
        (changed(layer__urls=["https://elsewhere.example/layer"]), "foreign"),
        (changed(layer__mediaType=f"{LAYER_TAR}+gzip+encrypted"), "encrypted"),
    ],
)
def test_strange_manifest_is_an_error(document: object, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        read(document)
    assert "\n" not in str(caught.value)


def test_schema_1_is_named_by_its_type_too() -> None:
    with pytest.raises(RegistryError, match="schema 1"):
        read({"fsLayers": []}, "application/vnd.docker.distribution.manifest.v1+prettyjws")
