"""A registry, or who sits between it and us, as the adversary: it serves what it likes and has not the key.

Each attack is on an image that is signed with the required key; the puller must end in one Failure, with
nothing unpacked. A registry in memory is changed in place: docker-registry would refuse to store most of it.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from runtime import oci
from runtime.errors import RegistryError, exit_code
from runtime.files import temporary_folder
from runtime.oci import signatures
from runtime.oci.image import build
from runtime.provenance import attached, attaching
from tests.faults.quirky_registry import Quirks, QuirkyRegistry
from tests.oci.conftest import quick
from tests.oci.keypairs import KeyPair, make_pair


@dataclass
class Victim:
    """A signed image in a registry that the adversary holds."""

    server: QuirkyRegistry
    reference: oci.Reference
    digest: str
    pair: KeyPair
    folder: Path

    @property
    def manifests(self) -> dict[str, tuple[str, bytes]]:
        return self.server.content.manifests

    @property
    def blobs(self) -> dict[str, bytes]:
        return self.server.content.blobs

    def key(self, selector: str) -> str:
        return f"/v2/{self.reference.repository} {selector}"

    def put(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def rewrite(self, selector: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Serve another manifest under a tag or digest."""
        kind, data = self.manifests[self.key(selector)]
        document = json.loads(data)
        change(document)
        self.manifests[self.key(selector)] = kind, json.dumps(document).encode()

    @property
    def signature_tag(self) -> str:
        return signatures.tag(self.digest)

    def pull(self, target: Path) -> None:
        oci.pull(self.reference, target, access=quick(attempts=2).requiring([str(self.pair.public)]))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def victim(tmp_path: Path, pair: KeyPair) -> Iterator[Victim]:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 300)
    server = QuirkyRegistry(Quirks(referrers=True))
    reference = oci.parse(f"{server.host}/team/support:v1")
    key = oci.read_private(pair.private)
    names = [path.name for path in folder.iterdir()]
    with temporary_folder("push-") as scratch, attaching(folder, names, reference, key=key) as beside:
        digest = oci.push_image(lambda: build(folder, scratch), reference, access=quick(), beside=beside)
    yield Victim(server, reference, digest, pair, folder)
    server.stop()


def test_the_signed_image_itself_is_pulled(victim: Victim, tmp_path: Path) -> None:
    victim.pull(tmp_path / "back")
    assert (tmp_path / "back/adapter_config.json").read_text() == '{"r": 8}'


def other_layer(victim: Victim) -> None:
    """Another layer under the signed manifest's digest."""
    layer = json.loads(victim.manifests[victim.key("v1")][1])["layers"][0]["digest"]
    victim.blobs[layer] = bytes(len(victim.blobs[layer]))


def flipped_layer(victim: Victim) -> None:
    layer = json.loads(victim.manifests[victim.key("v1")][1])["layers"][0]["digest"]
    data = bytearray(victim.blobs[layer])
    data[len(data) // 2] ^= 1
    victim.blobs[layer] = bytes(data)


def other_manifest(victim: Victim) -> None:
    """The tag leads to a manifest with a layer of the adversary's."""
    mine = victim.put(gzip.compress(b"\0" * 10_240))
    victim.rewrite(
        "v1", lambda document: document["layers"][0].update(digest=mine, size=len(victim.blobs[mine]))
    )


def manifest_under_the_signed_digest(victim: Victim) -> None:
    victim.reference = replace(victim.reference, tag=None, digest=victim.digest)
    victim.rewrite(victim.digest, lambda document: document.update(annotations={"a": "b"}))


def wrapped_in_an_index(victim: Victim) -> None:
    """An unsigned index that leads to an image of the adversary's, beside the signed one."""
    other_manifest(victim)
    kind, data = victim.manifests[victim.key("v1")]
    mine = f"sha256:{hashlib.sha256(data).hexdigest()}"
    victim.manifests[victim.key(mine)] = kind, data
    entries = [
        {
            "mediaType": kind,
            "digest": digest,
            "size": len(data),
            "platform": {"os": "linux", "architecture": "amd64"},
        }
        for digest in (mine, victim.digest)
    ]
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
    victim.manifests[victim.key("v1")] = index["mediaType"], json.dumps(index).encode()  # type: ignore[assignment]


def no_signature(victim: Victim) -> None:
    del victim.manifests[victim.key(victim.signature_tag)]


def own_signature(victim: Victim) -> None:
    """Signed by the adversary's key, which is not the required one."""
    no_signature(victim)
    pair = make_pair(victim.folder.parent)  # in place of the other's files: the required key is read anew
    victim.pair, mine = make_pair(victim.folder), oci.read_private(pair.private)
    oci.sign(victim.reference, victim.digest, mine, access=quick())


def signature_of_another_image(victim: Victim) -> None:
    other_manifest(victim)
    data = victim.manifests[victim.key("v1")][1]
    name = signatures.tag(f"sha256:{hashlib.sha256(data).hexdigest()}")
    victim.manifests[victim.key(name)] = victim.manifests[victim.key(victim.signature_tag)]


def signature_of_another_repository(victim: Victim) -> None:
    for key in list(victim.manifests):
        victim.manifests[key.replace("team/support", "team/finance")] = victim.manifests[key]
    victim.reference = oci.parse(f"{victim.server.host}/team/finance:v1")


def changed_payload(victim: Victim) -> None:
    layer = json.loads(victim.manifests[victim.key(victim.signature_tag)][1])["layers"][0]
    payload = victim.blobs[layer["digest"]].replace(b"team/support", b"team/finance")
    mine = victim.put(payload)
    victim.rewrite(victim.signature_tag, lambda d: d["layers"][0].update(digest=mine, size=len(payload)))


def payload_of_another_digest(victim: Victim) -> None:
    layer = json.loads(victim.manifests[victim.key(victim.signature_tag)][1])["layers"][0]
    victim.blobs[layer["digest"]] = victim.blobs[layer["digest"]].replace(b"team/support", b"team/finance")


def signature_bytes(text: str) -> Callable[[Victim], None]:
    def attack(victim: Victim) -> None:
        notes = {signatures.SIGNATURE: text}
        victim.rewrite(victim.signature_tag, lambda document: document["layers"][0].update(annotations=notes))

    return attack


def hundred_signatures(victim: Victim) -> None:
    victim.rewrite(victim.signature_tag, lambda document: document.update(layers=document["layers"] * 100))


def endless_payload(victim: Victim) -> None:
    """A payload that states a few bytes and has many."""
    layer = json.loads(victim.manifests[victim.key(victim.signature_tag)][1])["layers"][0]
    victim.blobs[layer["digest"]] = bytes(8 << 20)


def signatures_that_are_an_index(victim: Victim) -> None:
    victim.manifests[victim.key(victim.signature_tag)] = (
        "application/vnd.oci.image.index.v1+json",
        b'{"schemaVersion": 2, "manifests": []}',
    )


ATTACKS = {
    other_layer: "has other bytes",
    flipped_layer: "has other bytes",
    other_manifest: "is not signed",
    manifest_under_the_signed_digest: "requested sha256:",
    wrapped_in_an_index: "is not signed",
    no_signature: "is not signed",
    own_signature: "none by the required key",
    signature_of_another_image: "is for the image",
    signature_of_another_repository: "is for the repository",
    changed_payload: "none by the required key",
    payload_of_another_digest: "damaged",
    signature_bytes(""): "none by the required key",
    signature_bytes("%%%"): "none by the required key",
    signature_bytes("MAYCAQACAQA="): "none by the required key",
    signature_bytes("A" * 100_000): "none by the required key",
    hundred_signatures: "expected at most 64",
    endless_payload: "more than 4 MiB",
    signatures_that_are_an_index: "not an image manifest",
}


@pytest.mark.parametrize(
    ("attack", "said"), ATTACKS.items(), ids=lambda given: getattr(given, "__name__", "")
)
def test_attack_ends_in_a_refusal_and_nothing_is_unpacked(
    attack: Callable[[Victim], None], said: str, victim: Victim, tmp_path: Path
) -> None:
    attack(victim)
    before = len(victim.server.seen)
    with pytest.raises(RegistryError, match=said) as told:
        victim.pull(tmp_path / "back")
    assert exit_code(told.value) == 5
    assert not (tmp_path / "back").exists()
    fetched = {seen.path for seen in victim.server.seen[before:] if "/blobs/" in seen.path}
    layers = {each["digest"] for each in json.loads(victim.manifests[victim.key("v1")][1]).get("layers", ())}
    if "other bytes" not in said:  # that is found by reading; all others before a layer is asked for
        assert not {path for path in fetched if path.rpartition("/")[2] in layers}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": ""}]}',
        b'{"_type": "https://in-toto.io/Statement/v1", "subject": 3, "predicate": {"buildDefinition": []}}',
        b"[" * 200_000,
    ],
)
def test_inspect_of_statements_that_are_none_shows_the_image(document: bytes, victim: Victim) -> None:
    for name, (kind, data) in list(victim.manifests.items()):
        manifest = json.loads(data)
        if "subject" in manifest:
            manifest["layers"][0].update(digest=victim.put(document), size=len(document))
            forged = json.dumps(manifest).encode()
            del victim.manifests[name]
            victim.manifests[victim.key(f"sha256:{hashlib.sha256(forged).hexdigest()}")] = kind, forged
    info = oci.inspect(victim.reference, quick())
    keys = oci.read_keys([str(victim.pair.public)])
    found = attached(victim.reference, info, keys, access=quick())
    assert found.signatures == (f"by {victim.pair.public}: valid",)
    assert {each.state for each in found.statements} <= {"refused, it is about another image"}
