"""The bill of materials, validated against CycloneDX's own schema."""

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from runtime.provenance import bom
from runtime.provenance.facts import Facts

DIGEST = "sha256:" + "e" * 64
HASHES = {"adapter_model.safetensors": "1" * 64, "adapter_config.json": "2" * 64}


def built(folder: Path, hashes: dict[str, str] = HASHES) -> dict[str, Any]:
    document = bom.build(Facts.read(folder), hashes, name="host.test/adapters/support", digest=DIGEST)
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document, allow_nan=False))
    assert fault is None, fault
    return document


def test_bill_lists_files_model_data_and_the_packages_that_made_them(tuned: Path) -> None:
    components = built(tuned)["components"]
    found = {(each["type"], each["name"]): each for each in components}
    assert found["file", "adapter_model.safetensors"]["hashes"] == [{"alg": "SHA-256", "content": "1" * 64}]
    assert found["machine-learning-model", "microsoft/phi-4"]["version"] == "a" * 40
    assert found["data", "more.jsonl"]["hashes"][0]["content"] == "d" * 64
    torch = found["library", "torch"]
    assert (torch["purl"], torch["scope"]) == ("pkg:pypi/torch@2.13.0%2Bcpu", "excluded")
    assert built(tuned) == built(tuned)


def test_bill_of_a_folder_of_which_nothing_is_known_is_its_files(tmp_path: Path) -> None:
    assert [each["name"] for each in built(tmp_path)["components"]] == sorted(HASHES)


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        '{"model": {"name": "x y/ü", "revision": "a b"}, "packages": {"": ""}}',
        '{"packages": {"a": "\\ud800", "b\\udfff": "1", "\\ud801": "2", "c": "\\u0007 3"}}',
    ],
)
def test_odd_report_gives_a_valid_bill(report: str, tuned: Path) -> None:
    (tuned / "tuning_report.json").write_text(report)
    built(tuned)


def test_files_beyond_the_most_are_counted(tmp_path: Path) -> None:
    hashes = {f"{number}.bin": "0" * 64 for number in range(bom.MOST_FILES + 3)}
    document = bom.build(Facts.read(tmp_path), hashes, name="x", digest=DIGEST)
    assert len(document["components"]) == bom.MOST_FILES
    assert document["metadata"]["component"]["properties"][0]["value"] == "3"
