"""Objects as YAML, for readers with other rules than ours."""

import pytest
import yaml

from runtime.config import yaml_documents
from runtime.workspace.kubernetes import text


@pytest.mark.parametrize(
    "value",
    [
        "12e4567",
        "1e5",
        "0o17",
        "0x1f",
        "2026-11-30",
        "12:30",
        "y",
        "no",
        "null",
        "~",
        "1.0",
        "+1",
        ".5",
        "1_000",
    ],
)
def test_texts_that_look_otherwise_stay_texts_for_every_reader(value: str) -> None:
    written = text.dump([{"a": value}])
    assert "'" in written or '"' in written  # Go's readers of YAML take some for numbers that Python's do not
    assert yaml.safe_load(written) == {"a": value}
    assert yaml_documents(written, "x") == [{"a": value}]


def test_texts_of_several_lines_are_blocks_and_lists_indented() -> None:
    assert text.dump([{"a": "b\nc\n", "d": ["e"]}]) == "a: |\n  b\n  c\nd:\n  - e\n"
