"""The statement, read back by in-toto's own parser of statements and of SLSA's predicate; its envelope."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from runtime import __version__
from runtime.files import sha256
from runtime.oci.keys import read_private, read_public
from runtime.provenance import statement
from runtime.provenance.facts import Facts
from tests.oci.conftest import needs
from tests.oci.keypairs import KeyPair, make_pair

DIGEST = "sha256:" + "e" * 64


def built(folder: Path) -> dict[str, Any]:
    hashes = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
    name = "host.test/adapters/support"
    return statement.build(Facts.read(folder), hashes, name=name, digest=DIGEST, bom_sha256="f" * 64)


def parsed(document: dict[str, Any]) -> provenance_pb2.Provenance:
    """Return SLSA's predicate by in-toto's parsers, both strict but for our extension of the predicate."""
    message = json_format.Parse(json.dumps(document), statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    assert message.subject[0].digest["sha256"] == DIGEST.removeprefix("sha256:")
    predicate = dict(document["predicate"])
    predicate.pop(statement.SCORES, None)
    found = json_format.Parse(json.dumps(predicate), provenance_pb2.Provenance())
    assert found.build_definition.build_type
    assert found.run_details.builder.id
    return found


def test_statement_of_a_job_says_what_it_used_and_what_came_of_it(tuned: Path) -> None:
    document = built(tuned)
    found = parsed(document)
    base, *data = found.build_definition.resolved_dependencies
    assert base.uri == f"pkg:huggingface/microsoft/phi-4@{'a' * 40}"
    assert dict(base.digest) == {"gitCommit": "a" * 40, "weightsSha256": "b" * 64}
    assert [(each.name, each.digest["sha256"]) for each in data] == [
        ("tickets.parquet", "c" * 64),
        ("more.jsonl", "d" * 64),
    ]
    assert found.build_definition.external_parameters["lora"]["r"] == 16
    assert dict(found.run_details.builder.version) == {"workspace-runtime": "0.1.9"}
    made = {each.name: each.digest["sha256"] for each in found.run_details.byproducts}
    assert made["adapter_model.safetensors"] == sha256(tuned / "adapter_model.safetensors")
    assert made["bom.cdx.json"] == "f" * 64
    scores = document["predicate"][statement.SCORES]
    assert (scores["heldOutLossBefore"], scores["heldOutLossAfter"], scores["verdict"]) == (
        2.5,
        1.25,
        "learnt",
    )


def test_statement_holds_no_secret_and_no_sample(tuned: Path) -> None:
    text = json.dumps(built(tuned))
    assert not {word for word in ("s3cr3t", "pa55word", "hf_abc", "Who is") if word in text}


def test_statement_of_any_other_folder_says_only_what_is_known(tuned: Path) -> None:
    (tuned / "tuning_report.json").unlink()
    found = parsed(built(tuned))
    assert [each.name for each in found.build_definition.resolved_dependencies] == ["phi-4"]
    assert found.build_definition.build_type == statement.PUSHED
    assert dict(found.run_details.builder.version) == {"workspace-runtime": __version__}
    (tuned / "adapter_config.json").write_text("{}")
    assert not parsed(built(tuned)).build_definition.resolved_dependencies


@pytest.mark.parametrize(
    "report",
    [
        "[1]",
        '{"model": 3, "data": {"files": [3, {"sha256": "x"}, {"name": [], "sha256": 4}]}, "settings": [1]}',
        '{"model": {"weights_sha256": "zz", "commit": 7}, "versions": {"a": 1}, "packages": ["x"]}',
        '{"settings": {"a": NaN, "b": [Infinity]}, "result": {"train_loss": NaN, "held_out_loss": 3}}',
        '{"settings": ' + '{"a": ' * 60 + "1" + "}" * 60 + "}",
        '{"settings": {"a": "' + "x" * 100_000 + '"}, "verdict": {"kind": "\\ud800"}}',
    ],
)
def test_report_of_odd_types_still_gives_a_statement(report: str, tuned: Path) -> None:
    (tuned / "tuning_report.json").write_text(report)
    document = built(tuned)
    parsed(
        json.loads(json.dumps(document, allow_nan=False).encode("utf-8", "replace").replace(b"\\ud800", b"?"))
    )
    assert len(json.dumps(document)) < 20_000


def test_envelope_opens_with_its_key_and_tells_another(pair: KeyPair, tmp_path: Path) -> None:
    other = make_pair(tmp_path)
    keys = [read_public(str(each.public)) for each in (other, pair)]
    sealed = statement.seal(b'{"a": 1}', read_private(pair.private))
    assert statement.unseal(sealed, keys) == ({"a": 1}, keys[1])
    assert statement.unseal(sealed, keys[:1]) == ({"a": 1}, None)
    forged = json.loads(sealed)
    forged["payload"] = base64.b64encode(b'{"a": 2}').decode()
    assert statement.unseal(json.dumps(forged).encode(), keys) == ({"a": 2}, None)
    for nothing in (b"", b"[]", b'{"payload": 1}', b"\xff", b"[" * 99_999):
        assert statement.unseal(nothing, keys) is None


@needs("openssl")
def test_openssl_verifies_an_envelope_by_the_rule_of_dsse(pair: KeyPair, tmp_path: Path) -> None:
    envelope = json.loads(statement.seal(b'{"a": 1}', read_private(pair.private)))
    kind = envelope["payloadType"]
    (tmp_path / "pae").write_bytes(f'DSSEv1 {len(kind)} {kind} 8 {{"a": 1}}'.encode())
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    verify = ["openssl", "dgst", "-sha256", "-verify", pair.public, "-signature", tmp_path / "sig"]
    assert subprocess.check_output([*verify, tmp_path / "pae"], text=True).strip() == "Verified OK"
