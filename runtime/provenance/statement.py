"""An image's provenance as an in-toto statement with SLSA's predicate, and its envelope when it is signed.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
and https://github.com/secure-systems-lab/dsse. The same facts give the same bytes: there is no time in it.
Start at `build`, then `seal` and `unseal`.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtime import __version__, packing
from runtime.adapters import CONFIG_FILE, WEIGHTS_FILE
from runtime.oci.keys import SigningKey, VerificationKey
from runtime.packing import as_object
from runtime.provenance.facts import BaseModel, Facts

MEDIA_TYPE = "application/vnd.in-toto+json"
ENVELOPE = "application/vnd.dsse.envelope.v1+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
TUNED = "urn:workspace-runtime:tune:v1"
"""The `buildType` of what a tuning job made."""
PUSHED = "urn:workspace-runtime:push:v1"
"""The `buildType` of any other folder."""
SCORES = "workspaceRuntime_scores"
"""An extension of SLSA's predicate: what was measured."""
_BUILDER = "urn:workspace-runtime"
_STATED_FILES = (WEIGHTS_FILE, CONFIG_FILE, packing.REPORT)
_MOST_SIGNATURES = 16


def build(
    facts: Facts, hashes: Mapping[str, str], *, name: str, digest: str, bom_sha256: str
) -> dict[str, Any]:
    """Return the statement on the image `digest` in the repository `name`, with files of these `hashes`."""
    tuned = bool(facts.settings)
    version = facts.versions.get("workspace-runtime", __version__) if tuned else __version__
    definition = {
        "buildType": TUNED if tuned else PUSHED,
        "externalParameters": dict(facts.settings),
        "internalParameters": dict(facts.machine),
        "resolvedDependencies": [*([_base(facts.base)] if facts.base else []), *_data(facts)],
    }
    made = [{"name": file, "digest": {"sha256": hashes[file]}} for file in _STATED_FILES if file in hashes]
    made.append({"name": "bom.cdx.json", "digest": {"sha256": bom_sha256}})
    details: dict[str, Any] = {
        "builder": {"id": _BUILDER, "version": {"workspace-runtime": version}},
        "byproducts": made,
    }
    if facts.job:
        details["metadata"] = {"invocationId": facts.job}
    predicate = {"buildDefinition": definition, "runDetails": details}
    if facts.scores:
        predicate[SCORES] = dict(facts.scores)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }


def _base(base: BaseModel) -> dict[str, Any]:
    digests = {"gitCommit": base.commit, "weightsSha256": base.weights_sha256}
    entry: dict[str, Any] = {"name": base.name or base.repository or "base model"}
    if base.purl:
        entry["uri"] = base.purl
    if stated := {key: value for key, value in digests.items() if value}:
        entry["digest"] = stated
    return entry


def _data(facts: Facts) -> list[dict[str, Any]]:
    return [{"name": file.name, "digest": {"sha256": file.sha256}} for file in facts.data]


def seal(statement: bytes, key: SigningKey) -> bytes:
    """Return the statement in a DSSE envelope, signed."""
    signature = base64.b64encode(key.sign(_signed_bytes(statement))).decode()
    envelope = {
        "payloadType": MEDIA_TYPE,
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": key.public.id, "sig": signature}],
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def unseal(
    envelope: bytes, keys: Sequence[VerificationKey]
) -> tuple[dict[str, Any], VerificationKey | None] | None:
    """Return the statement in an envelope and which of `keys` has signed it; None for what is no envelope."""
    try:
        document = json.loads(envelope)
        payload = base64.b64decode(document["payload"], validate=True)
        signatures = [base64.b64decode(each["sig"], validate=True) for each in document["signatures"]]
        if document["payloadType"] != MEDIA_TYPE:
            return None
        statement = as_object(json.loads(payload))
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
        return None
    signed, tried = _signed_bytes(payload), signatures[:_MOST_SIGNATURES]
    signer = next((key for key in keys for each in tried if key.verifies(signed, each)), None)
    return statement, signer


def _signed_bytes(payload: bytes) -> bytes:
    """Return what is signed: DSSE's pre-authentication encoding."""
    kind = MEDIA_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
