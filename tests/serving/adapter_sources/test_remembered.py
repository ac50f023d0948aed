"""Failures by name: until when they are known, and how many."""

from runtime.errors import UnknownModelError
from runtime.serving.adapter_sources import remembered
from runtime.serving.adapter_sources.remembered import RememberedFailures


def test_a_failure_is_known_until_its_time() -> None:
    now = [0.0]
    failures = RememberedFailures(lambda: now[0])
    failure = UnknownModelError("x")
    failures.put("a", failure, seconds=60)
    now[0] = 59
    assert failures.get("a") is failure
    assert failures.get("b") is None
    now[0] = 60
    assert failures.get("a") is None


def test_the_table_is_bounded() -> None:
    failures = RememberedFailures(lambda: 0.0)
    for number in range(remembered.MOST_NAMES + 10):
        failures.put(str(number), UnknownModelError("x"), seconds=60)
    assert failures.get("9") is None
    assert failures.get("10") is not None
    assert len(failures._failures) == remembered.MOST_NAMES
