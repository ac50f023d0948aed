"""The terminal's progress bar, and log lines above it."""

import io
import logging

import pytest
from rich.console import Console

from runtime.tuning.train.progress import Reporter, Throughput
from runtime.tuning.train.terminal_bar import TerminalBar
from tests.tuning.train.conftest import Clock, take_step


def test_terminal_shows_a_bar_and_log_lines_stay_whole_above_it(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    try:
        bar = TerminalBar(Console(file=screen, force_terminal=True, width=100, highlight=False), clock)
        throughput = Throughput(clock=clock)
        reporter = Reporter(throughput, display=bar, clock=clock)
        throughput.start(0, 4)
        for step in (1, 2):
            take_step(throughput, step, clock)
            reporter.record()
        logging.getLogger("test").warning("a line beside the bar")
        take_step(throughput, 3, clock, 0.01)
        reporter.show()  # too soon to draw again
        take_step(throughput, 4, clock, 0.01)
        reporter.show()
        reporter.close()
        assert handler.stream is screen
        logging.getLogger("test").warning("and one after it")
    finally:
        logging.getLogger().removeHandler(handler)
    shown = screen.getvalue()
    assert "step 2/4" in shown
    assert "step 3/4" not in shown
    assert "step 4/4" in shown
    assert "\x1b[2Ka line beside the bar\n" in shown or "\na line beside the bar\n" in shown
    assert shown.endswith("and one after it\n")
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0  # the cursor is back


def test_an_evaluation_has_a_bar_of_its_own(clock: Clock) -> None:
    screen = io.StringIO()
    bar = TerminalBar(Console(file=screen, force_terminal=True, width=100, highlight=False), clock)
    throughput = Throughput(clock=clock)
    reporter = Reporter(throughput, display=bar, clock=clock)
    for done in (1, 2, 3):
        reporter.show_activity("evaluating", done, 3)  # the second one comes too soon after the first
    reporter.close()
    shown = screen.getvalue()
    assert "evaluating 1/3" in shown
    assert "evaluating 2/3" not in shown
    assert "evaluating 3/3" in shown
    assert "nan" not in shown
