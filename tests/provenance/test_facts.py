"""What is read of a report that anybody may have written, and what reading it costs."""

import json
from pathlib import Path

import pytest
from packageurl import PackageURL

from runtime.provenance import bom, statement
from runtime.provenance.facts import Facts
from tests.costs import assert_linear


def test_long_key_is_not_searched_for_each_text_under_it(tmp_path: Path) -> None:
    def read(size: int) -> None:
        report = {"settings": {"k " * size: ["a"] * (size // 10)}}
        (tmp_path / "tuning_report.json").write_text(json.dumps(report))
        assert Facts.read(tmp_path).settings

    assert_linear(read, 200, 3200)


def test_text_under_a_long_key_that_ends_in_a_secrets_name_is_hidden(tmp_path: Path) -> None:
    settings = {"k " * 200 + "api_key": "s3cr3tS3cr3t"}
    (tmp_path / "tuning_report.json").write_text(json.dumps({"settings": settings}))
    assert list(Facts.read(tmp_path).settings.values()) == ["[redacted]"]


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1 @ 2#é"])
def test_statement_and_bill_name_the_base_model_by_one_package_url(revision: str, tmp_path: Path) -> None:
    report = {"model": {"repository": "a/b.c", "revision": revision}}
    (tmp_path / "tuning_report.json").write_text(json.dumps(report))
    facts = Facts.read(tmp_path)
    stated = statement.build(facts, {}, name="x", digest="sha256:0", bom_sha256="0")
    (base,) = stated["predicate"]["buildDefinition"]["resolvedDependencies"]
    (model,) = bom.build(facts, {}, name="x", digest="sha256:0")["components"]
    assert base["uri"] == model["purl"]
    read = PackageURL.from_string(base["uri"])
    assert (read.type, read.namespace, read.name, read.version) == ("huggingface", "a", "b.c", revision)
