"""What is attached to an image while it is pushed, found again by API, by tag, and in a layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import oci, packing
from runtime.files import temporary_folder
from runtime.oci import images, referrers
from runtime.oci.image import build
from runtime.provenance import Attached, attached, attaching, statement
from tests.oci.conftest import Start, Started, fresh, needs, quick
from tests.oci.keypairs import KeyPair, make_pair


def push(folder: Path, reference: oci.Reference, pair: KeyPair | None = None, *, stated: bool = True) -> str:
    files = packing.files(folder)
    key = oci.read_private(pair.private) if pair else None
    with (
        temporary_folder("push-") as scratch,
        attaching(folder, files, reference, key=key, stated=stated) as beside,
    ):
        return oci.push_image(
            lambda: build(folder, scratch, files=files), reference, access=quick(), beside=beside
        )


def found(reference: oci.Reference, *pairs: KeyPair) -> Attached:
    keys = oci.read_keys([str(each.public) for each in pairs])
    return attached(reference, oci.inspect(reference, quick()), keys, access=quick())


def check(reference: oci.Reference, pair: KeyPair) -> None:
    beside = found(reference, pair)
    assert beside.signatures == (f"by {pair.public}: valid",)
    (stated,) = beside.statements
    assert stated.state == f"signed by {pair.public}"
    assert stated.facts["from phi-4"].startswith("pkg:huggingface/microsoft/phi-4@")
    (bom,) = beside.boms
    assert bom["bomFormat"] == "CycloneDX"
    assert not beside.others


@pytest.mark.system
@needs("docker-registry")
def test_registry_without_the_api_keeps_an_index_under_a_tag(
    open_registry: Started, tuned: Path, pair: KeyPair
) -> None:
    reference = fresh(open_registry.host, "adapter")
    digest = push(tuned, reference, pair)
    check(reference, pair)
    index = reference.tagged(referrers.fallback_tag(digest))
    store = images.open_store(index, quick())
    first = store.find(index.selector)
    store.close()
    assert first is not None
    assert {each["artifactType"] for each in first.document["manifests"]} == {
        "application/vnd.in-toto+json",
        "application/vnd.cyclonedx+json",
    }
    assert push(tuned, reference, pair) == digest
    store = images.open_store(index, quick())
    assert store.find(index.selector) == first
    store.close()


def test_registry_with_the_api_gets_no_tag(start: Start, tuned: Path, pair: KeyPair) -> None:
    server = start(referrers=True)
    reference = oci.parse(f"{server.host}/a/support:v1")
    digest = push(tuned, reference, pair)
    check(reference, pair)
    assert not server.find("PUT", referrers.fallback_tag(digest) + "$")
    tag = server.find("PUT", "/manifests/v1$")[0]
    assert tag is server.find("PUT", "/manifests/")[-1]  # who pulls by the tag finds a signed image


def test_what_is_attached_is_read_one_by_one(start: Start, tuned: Path) -> None:
    """There may be a thousand of them, of 4 MiB each, by anybody."""
    server = start(referrers=True)
    reference = oci.parse(f"{server.host}/a/support:v1")
    digest = push(tuned, reference)
    before = len(server.find("GET", "/manifests/sha256:"))
    store = images.open_store(reference, quick())
    listed = iter(store.referrers(digest))
    assert next(listed).document["subject"]["digest"] == digest
    assert len(server.find("GET", "/manifests/sha256:")) == before + 1
    assert len(list(listed)) == 1
    store.close()


@pytest.mark.parametrize("status", [400, 405, 200])
def test_registry_that_answers_anything_to_an_unknown_route_has_no_api(
    status: int, start: Start, tuned: Path, pair: KeyPair
) -> None:
    reference = oci.parse(f"{start(unknown_route=status).host}/a/support:v1")
    push(tuned, reference, pair)
    check(reference, pair)


def test_layout_holds_all_of_it_and_pushing_again_changes_nothing(
    tuned: Path, pair: KeyPair, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    digest = push(tuned, reference, pair)
    check(reference, pair)
    before = {path: path.read_bytes() for path in (tmp_path / "layout").rglob("*") if path.is_file()}
    assert push(tuned, reference, pair) == digest
    assert {path: path.read_bytes() for path in (tmp_path / "layout").rglob("*") if path.is_file()} == before
    assert oci.inspect(oci.parse(f"oci:{tmp_path}/layout")).digest == digest  # still its only image


def test_unsigned_statement_and_foreign_keys_are_told_apart(
    tuned: Path, pair: KeyPair, tmp_path: Path
) -> None:
    plain, signed = oci.parse(f"oci:{tmp_path}/plain:v1"), oci.parse(f"oci:{tmp_path}/signed:v1")
    push(tuned, plain)
    push(tuned, signed, pair)
    assert (found(plain).signatures, found(plain).statements[0].state) == ((), "not signed")
    other = make_pair(tmp_path)
    assert found(signed, other).signatures == ("by another key than those given",)
    assert found(signed, other).statements[0].state == "signed by another key than those given"
    assert found(signed).signatures == ("not checked: no key was given",)


def test_nothing_is_stated_where_nobody_wants_it(tuned: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    push(tuned, reference, stated=False)
    assert found(reference) == Attached((), (), (), ())


def test_registry_that_takes_no_artifacts_has_the_image_and_the_log_says_so(
    start: Start,
    tuned: Path,
    pair: KeyPair,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start()
    reference = oci.parse(f"{server.host}/a/support:v1")
    handler: Any = server.RequestHandlerClass
    answer = handler.answer_manifest

    def refuse(self: Any, path: str, body: bytes) -> Any:
        if self.command == "PUT" and b'"artifactType"' in body:
            return 400, [], b'{"errors":[{"code":"MANIFEST_INVALID","message":"no artifacts here"}]}'
        return answer(self, path, body)

    monkeypatch.setattr(handler, "answer_manifest", refuse)
    push(tuned, reference, pair)
    assert "pushed without a statement of where it comes from" in caplog.text
    assert "no artifacts here" in caplog.text
    assert found(reference, pair).signatures == (f"by {pair.public}: valid",)


def test_statement_about_another_image_is_told(tuned: Path, tmp_path: Path, pair: KeyPair) -> None:
    """Who controls the registry can attach one image's statement to another."""
    good, evil = oci.parse(f"oci:{tmp_path}/layout:good"), oci.parse(f"oci:{tmp_path}/layout:evil")
    digest = push(tuned, good, pair)
    (tuned / "adapter_model.safetensors").write_bytes(b"others")
    changed = push(tuned, evil, stated=False)
    store: Any = images.open_store(evil, quick())
    mine = next(
        each for each in store.referrers(digest) if each.document["artifactType"] == statement.MEDIA_TYPE
    )
    document = mine.document | {"subject": {**mine.document["subject"], "digest": changed}}
    with store.writing():
        store.attach(type(mine)(json.dumps(document).encode(), mine.media_type), changed)
    assert found(evil, pair).statements[0].state == "refused, it is about another image"
