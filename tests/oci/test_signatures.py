"""Signatures: skopeo and OpenSSL check ours, ours are checked against skopeo's; what is refused, and when."""

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import oci
from runtime.errors import ConfigError, RegistryError, exit_code
from runtime.oci import images, signatures
from runtime.oci.blobs import from_bytes
from runtime.oci.image import CONFIG, assemble
from runtime.oci.layout import Layout
from runtime.oci.store import StoredManifest
from tests.oci.conftest import Started, files, fresh, indexed, needs, quick
from tests.oci.keypairs import KeyPair, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_pair(tmp_path_factory.mktemp("others"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def signed(folder: Path, reference: oci.Reference, pair: KeyPair) -> str:
    digest = oci.push(folder, reference, access=quick())
    oci.sign(reference, digest, oci.read_private(pair.private), access=quick())
    return digest


def pull(reference: oci.Reference, folder: Path, *keys: Path) -> Path:
    return oci.pull(reference, folder, access=replace(quick(), required_keys=tuple(map(str, keys))))


@pytest.mark.system
@needs("skopeo", "openssl")
def test_signature_that_openssl_made_is_accepted_for_an_image_that_skopeo_pushed(
    open_registry: Started, small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    """As `cosign attach signature` puts it there, the repository named with its tag as skopeo does it."""
    source, reference = oci.parse(f"oci:{tmp_path}/layout:v1"), fresh(open_registry.host, "theirs")
    oci.push(small, source)
    copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", str(source), f"docker://{reference}"]
    subprocess.run(copy, check=True)
    digest = oci.inspect(reference, quick()).digest
    critical = {"type": signatures.KIND, "image": {"docker-manifest-digest": digest}}
    critical["identity"] = {"docker-reference": str(reference)}
    payload = tmp_path / "payload"
    payload.write_text(json.dumps({"critical": critical, "optional": {"creator": "openssl"}}))
    made = subprocess.check_output(["openssl", "dgst", "-sha256", "-sign", pair.private, payload])
    blob = from_bytes(payload.read_bytes(), signatures.PAYLOAD)
    blob.descriptor.annotations[signatures.SIGNATURE] = base64.b64encode(made).decode()
    config = from_bytes(b"{}", CONFIG)
    name = reference.tagged(signatures.tag(digest))
    oci.push_image(lambda: assemble([blob], config, annotations={}), name, access=quick())
    assert files(pull(reference, tmp_path / "back", pair.public)) == files(small)
    oci.sign(reference, digest, oci.read_private(pair.private), access=quick())
    assert len(oci.inspect(name, quick()).manifest.layers) == 2


def test_openssl_verifies_the_payload_as_cosign_writes_it(
    open_registry: Started, small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    reference = fresh(open_registry.host, "signed")
    digest = signed(small, reference, pair)
    stored = oci.inspect(reference.tagged(digest.replace(":", "-") + ".sig"), quick())
    (layer,) = stored.manifest.layers
    assert layer.media_type == "application/vnd.dev.cosign.simplesigning.v1+json"
    store = images.open_store(reference, quick())
    payload = store.read(layer)
    store.close()
    assert json.loads(payload) == {
        "critical": {
            "identity": {"docker-reference": f"{reference.registry}/{reference.repository}"},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    (tmp_path / "payload").write_bytes(payload)
    (tmp_path / "sig").write_bytes(base64.b64decode(layer.annotations["dev.cosignproject.cosign/signature"]))
    verify = ["openssl", "dgst", "-sha256", "-verify", pair.public, "-signature", tmp_path / "sig"]
    assert subprocess.check_output([*verify, tmp_path / "payload"], text=True).strip() == "Verified OK"


def test_signing_again_writes_nothing_and_another_key_adds_its_own(
    small: Path, pair: KeyPair, other: KeyPair, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = signed(small, reference, pair)
    before = (tmp_path / "layout/index.json").read_bytes()
    signed(small, reference, pair)
    assert (tmp_path / "layout/index.json").read_bytes() == before
    signed(small, reference, other)
    for each in (pair, other):
        assert oci.verify(reference, digest, [str(each.public)]).name == str(each.public)
    assert oci.verify(reference, digest, [other.public.read_text()]).name == "the given key"
    back = oci.pull(oci.parse(f"oci:{tmp_path}/layout"), tmp_path / "back")  # still its only image
    assert files(back) == files(small)


def rewritten(
    store: Layout, reference: oci.Reference, digest: str, change: Callable[[dict[str, Any]], object]
) -> None:
    """Replace the payload of the image's only signature, its annotation kept."""
    (found,) = signatures.read(store, reference, digest)
    payload = json.loads(found.payload)
    change(payload)
    blob = from_bytes(json.dumps(payload).encode(), signatures.PAYLOAD)
    replace_layer(store, digest, blob.open().read(), found.layer.annotations)


def replace_layer(store: Layout, digest: str, payload: bytes, annotations: dict[str, str]) -> None:
    tag = signatures.tag(digest)
    stored = store.find(tag)
    assert stored is not None
    blob = from_bytes(payload, signatures.PAYLOAD)
    document = stored.document
    document["layers"] = [blob.descriptor.as_json() | {"annotations": annotations}]
    with store.writing():
        store.put_blob(blob, lambda size: None)
        store.put_manifest(StoredManifest(json.dumps(document).encode(), stored.media_type), tag)


def critical(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda payload: payload["critical"][name].update(value)


@pytest.mark.parametrize(
    "change",
    [
        critical("image", {"docker-manifest-digest": "sha256:" + "0" * 64}),
        critical("identity", {"docker-reference": "evil.test/other"}),
        lambda payload: payload.update(optional={"a": "b"}),
    ],
    ids=["digest", "repository", "more"],
)
def test_changed_payload_is_refused_before_a_layer_is_fetched(
    change: Callable[[dict[str, Any]], object], small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = signed(small, reference, pair)
    rewritten(Layout(tmp_path / "layout"), reference, digest, change)
    with pytest.raises(
        RegistryError, match=r"has 1 signature, none by the required key .*cosign.pub"
    ) as told:
        pull(reference, tmp_path / "back", pair.public)
    assert exit_code(told.value) == 5
    assert not (tmp_path / "back").exists()


def test_unsigned_images_and_those_of_another_key_are_refused_by_name(
    open_registry: Started, small: Path, pair: KeyPair, other: KeyPair, tmp_path: Path
) -> None:
    reference = fresh(open_registry.host, "plain")
    digest = oci.push(small, reference, access=quick())
    with pytest.raises(RegistryError, match=rf"{reference}@{digest}: is not signed"):
        pull(reference, tmp_path / "back", pair.public)
    oci.sign(reference, digest, oci.read_private(other.private), access=quick())
    with pytest.raises(RegistryError, match="none by the required key"):
        pull(reference, tmp_path / "back", pair.public)
    assert files(pull(reference, tmp_path / "back", pair.public, other.public)) == files(small)


def test_signature_of_another_image_or_repository_by_the_right_key_is_refused(
    open_registry: Started, small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    """What who controls the registry can do without the key: move signatures about."""
    good, evil = fresh(open_registry.host, "good"), fresh(open_registry.host, "evil")
    digest = signed(small, good, pair)
    store = images.open_store(good, quick())
    mine = store.find(signatures.tag(digest))
    assert mine is not None
    blobs = signatures.read(store, good, digest)
    config = from_bytes(
        store.read(oci.inspect(good.tagged(signatures.tag(digest)), quick()).manifest.config), ""
    )
    store.close()
    oci.push(small, evil, access=quick())
    (small / "adapter_config.json").write_text('{"r": 666}')
    changed = oci.push(small, evil.tagged("changed"), access=quick())
    theirs = images.open_store(evil, quick())
    with theirs.writing():
        for blob in (from_bytes(blobs[0].payload, signatures.PAYLOAD), config):
            theirs.put_blob(blob, lambda size: None)
        for name in (digest, changed):
            theirs.put_manifest(mine, signatures.tag(name))
    theirs.close()
    with pytest.raises(RegistryError, match=rf"for the repository '{good.registry}/{good.repository}', not"):
        pull(evil, tmp_path / "back", pair.public)
    with pytest.raises(RegistryError, match=rf"for the image {digest}, not for this one"):
        pull(evil.tagged("changed"), tmp_path / "back", pair.public)


def test_signed_index_vouches_for_its_images(small: Path, pair: KeyPair, tmp_path: Path) -> None:
    """`cosign sign` of an image for several machines signs the index alone."""
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = oci.push(small, reference)
    index = indexed(reference.tagged("both"), digest)
    oci.sign(reference, index, oci.read_private(pair.private))
    assert files(pull(reference.tagged("both"), tmp_path / "back", pair.public)) == files(small)
    with pytest.raises(RegistryError, match="is not signed"):
        pull(reference, tmp_path / "other", pair.public)


def test_pulled_folder_and_a_layer_changed_in_the_store_do_not_pass(
    small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    oci.push(small, reference)
    oci.pull(reference, tmp_path / "back")
    with pytest.raises(RegistryError, match="is not signed"):
        pull(reference, tmp_path / "back", pair.public)
    signed(small, reference, pair)
    assert pull(reference, tmp_path / "back", pair.public)
    layer = tmp_path / "layout/blobs/sha256" / oci.inspect(reference).manifest.layers[0].digest[7:]
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 1
    layer.write_bytes(data)
    with pytest.raises(RegistryError, match="damaged"):
        pull(reference, tmp_path / "new", pair.public)
    assert not (tmp_path / "new").exists()


def test_damaged_payload_is_found_by_its_digest(small: Path, pair: KeyPair, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = signed(small, reference, pair)
    (found,) = signatures.read(Layout(tmp_path / "layout"), reference, digest)
    path = tmp_path / "layout/blobs/sha256" / hashlib.sha256(found.payload).hexdigest()
    path.write_bytes(found.payload.replace(b"cosign", b"cosine"))
    with pytest.raises(RegistryError, match="is damaged in the store"):
        pull(reference, tmp_path / "back", pair.public)


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b'{"critical": 3}', b"[" * 60_000])
def test_payload_that_is_none_is_refused_though_signed(
    payload: bytes, small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = signed(small, reference, pair)
    signature = base64.b64encode(oci.read_private(pair.private).sign(payload)).decode()
    replace_layer(Layout(tmp_path / "layout"), digest, payload, {signatures.SIGNATURE: signature})
    with pytest.raises(RegistryError, match="no payload of cosign's"):
        pull(reference, tmp_path / "back", pair.public)


def test_no_more_signatures_are_read_than_an_image_has_signers(
    small: Path, pair: KeyPair, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = signed(small, reference, pair)
    store, tag = Layout(tmp_path / "layout"), signatures.tag(digest)
    stored = store.find(tag)
    assert stored is not None
    document = stored.document
    document["layers"] *= signatures.MOST_SIGNATURES + 1
    with store.writing():
        store.put_manifest(StoredManifest(json.dumps(document).encode(), stored.media_type), tag)
    with pytest.raises(RegistryError, match="65 of them, expected at most 64"):
        pull(reference, tmp_path / "back", pair.public)


def test_wrong_key_file_is_a_mistake_of_configuration_found_first(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        pull(oci.parse(f"oci:{tmp_path}/nothing:v1"), tmp_path / "back", tmp_path / "missing.pub")


def test_environment_and_flags_require_keys() -> None:
    access = oci.from_environment({"RUNTIME_REQUIRE_SIGNATURE": f"/a.pub{os.pathsep}/b.pub"})
    assert access.required_keys == ("/a.pub", "/b.pub")
    assert access.requiring(["/c.pub"]).required_keys == ("/c.pub",)
    assert access.requiring([]) is access
    assert oci.from_environment({}).required_keys == ()
