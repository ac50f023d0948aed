"""What is read of a report that anybody may have written, and what reading it costs."""

import json
from pathlib import Path

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
