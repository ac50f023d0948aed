"""Progress for logs and for terminals."""

import io
import logging
import sys

import pytest

from runtime.oci import progress


def test_log_lines_come_every_few_seconds_and_name_bytes_and_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = [0.0]
    monkeypatch.setattr("runtime.oci.progress.time.monotonic", lambda: clock[0])
    with progress.Progress("push x", 100_000_000) as shown:
        for _ in range(100):
            clock[0] += 0.1
            shown.add(1_000_000)
    shown.done("sha256:1")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("push x: 5")
    assert lines[0].endswith(" MB of 100.0 MB, 10.0 MB/s")
    assert 2 <= len(lines) <= 3
    assert lines[-1] == "push x: sha256:1 (100.0 MB in 10.0 s)"


def test_terminal_gets_a_bar_and_no_log_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress("push x", 10) as shown:
        shown.add(4)
    assert "push x" in screen.getvalue()
    assert not caplog.records


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (-2_000_000, "-2.0 MB"), (5e12, "5000.0 GB")],
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert progress.size(count) == text
