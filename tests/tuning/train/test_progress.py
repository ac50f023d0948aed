"""Figures of a run: what they are, the line, the history, and the bar of a terminal."""

import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from runtime.tuning.train.progress import MetricsHistory, Reporter, Throughput, duration
from runtime.tuning.train.terminal_bar import TerminalBar


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take_step(throughput: Throughput, step: int, clock: Clock, seconds: float = 2.0) -> None:
    clock.now += seconds
    throughput.count(tokens=100, trained_tokens=50)
    throughput.advance(step, 0.1)
    throughput.log(step, {"loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5, "epoch": 0.1})


def test_line_comes_every_few_seconds_and_names_every_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level("INFO")
    throughput = Throughput(world_size=2, clock=clock)
    reporter = Reporter(throughput, MetricsHistory(tmp_path / "history.jsonl"), clock=clock)
    throughput.start(10, 50)
    reporter.begin()
    for step in (11, 12, 13):
        take_step(throughput, step, clock)
        reporter.record()
    assert throughput.tokens_per_s == pytest.approx(100)  # two ranks, 300 tokens each in 6 s
    assert throughput.trained_share == pytest.approx(0.25)
    assert throughput.remaining_s == pytest.approx(74)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1  # 4 s after the first, nothing more is said
    for part in ("step 11/50", "epoch 0.10", "loss 2.0000", "lr 1.00e-04", "grad 0.500", "100 tokens/s"):
        assert part in lines[0]
    for part in ("(25% trained)", "memory ", " GiB", "left 1:18"):
        assert part in lines[0]
    clock.now += 5
    reporter.show()
    reporter.show(last=True)
    assert len(caplog.records) == 3
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert {"step", "loss", "held_out_loss", "tokens_per_s", "memory_bytes", "remaining_s"} <= fields.keys()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3


def test_history_is_json_though_figures_are_no_numbers(tmp_path: Path) -> None:
    history = MetricsHistory(tmp_path / "history.jsonl")
    throughput = Throughput()
    throughput.start(0, 5)
    throughput.log(1, {"loss": float("inf"), "grad_norm": float("nan")})
    Reporter(throughput, history).record()
    (line,) = history.path.read_text().splitlines()
    entry = json.loads(line, parse_constant=pytest.fail)
    assert entry["loss"] is None
    assert entry["gradient_norm"] is None


def test_history_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    history = MetricsHistory(tmp_path / "history.jsonl")
    for step in range(1, 8):
        history.append({"step": step, "loss": 1.0})
    with history.path.open("a") as stream:
        stream.write('{"step": 8, "lo')  # killed while it wrote
    history.truncate(4)
    history.append({"step": 5, "loss": 0.5})
    assert [entry["step"] for entry in history.entries()] == [1, 2, 3, 4, 5]
    assert history.entries()[-1]["loss"] == 0.5
    history.truncate(0)
    assert history.entries() == []


def test_remaining_time_of_more_than_a_day_says_so() -> None:
    assert duration(7) == "0:07"
    assert duration(3 * 3600 + 62) == "3:01:02"
    assert duration(30 * 3600) == "1d 06:00:00"
    throughput = Throughput(clock=lambda: 3600.0)
    throughput.start(0, 31)
    throughput.started = 0.0
    throughput.advance(1, 0.0)
    assert "left 1d 06:00:00" in throughput.position_text()


def test_run_without_a_step_for_far_longer_than_usual_is_stalled(clock: Clock) -> None:
    throughput = Throughput(clock=clock)
    throughput.start(0, 50)
    take_step(throughput, 1, clock, 100)
    clock.now += 1990
    assert not throughput.stalled  # twenty steps of 100 s
    clock.now += 20
    assert throughput.stalled
    take_step(throughput, 2, clock)
    assert not throughput.stalled


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
