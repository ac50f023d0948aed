"""Patterns from outside are matched within a time limit; what is no expression is said by name."""

import pytest

from runtime import lora_patterns
from runtime.errors import ConfigError

NAME = "model.layers.0.self_attn." + "a" * 40 + "_proj"


def test_a_pattern_that_takes_for_ever_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_patterns, "TIME_LIMIT_S", 1.5)
    with pytest.raises(ConfigError, match=r"alpha_pattern: matching '\(a\+\)\+\$' takes more than 1.5 s"):
        lora_patterns.pattern_keys(["q_proj", "(a+)+$"], [NAME, "model.q_proj"], "alpha_pattern")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", r"'\(' is no regular expression: "),
        ("*", r"'\*' is no regular expression: "),
        ("(" * 2000, "is no regular expression: "),
        ("a" * 5000, "has 5000 characters, expected at most 4096"),
    ],
)
def test_what_cannot_be_matched_is_one_line(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"rank_pattern: .*{reason}") as caught:
        lora_patterns.pattern_keys([pattern], [NAME], "rank_pattern")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_name_is_matched_here_and_an_expression_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process costs tens of milliseconds, so that plain names, which most adapters have, start none."""
    started = []
    real = lora_patterns._match_elsewhere
    monkeypatch.setattr(lora_patterns, "_match_elsewhere", lambda *args: started.append(args) or real(*args))
    for pattern in ("q_proj", "^model.layers.0.q_proj", r"layers\.0\.q_proj$"):
        lora_patterns.pattern_keys([pattern], ["model.layers.0.q_proj"], "rank_pattern")
    assert not started
    found = lora_patterns.pattern_keys([".*"], ["model.layers.0.q_proj"], "rank_pattern")
    assert found == {"model.layers.0.q_proj": ".*"}
    assert len(started) == 1
