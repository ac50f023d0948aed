"""The metrics of a run: their values, the log line and the history."""

import json
from pathlib import Path

import pytest

from runtime.tuning.train.progress import MetricsHistory, Reporter, Throughput, duration
from tests.tuning.train.conftest import Clock, take_step


def test_log_line_comes_every_few_seconds_and_has_every_metric(
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
    assert len(lines) == 1  # 4 s after the first, no second line
    for part in ("step 11/50", "epoch 0.10", "loss 2.0000", "lr 1.00e-04", "grad 0.500", "100 tokens/s"):
        assert part in lines[0]
    for part in ("(25% trained)", "memory ", " GiB", "left 1:18"):
        assert part in lines[0]
    clock.now += 5
    reporter.show()
    reporter.show(last=True)
    assert len(caplog.records) == 2
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert {"step", "loss", "held_out_loss", "tokens_per_s", "memory_bytes", "remaining_s"} <= fields.keys()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3


def test_history_is_json_though_metrics_are_not_finite(tmp_path: Path) -> None:
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


def test_an_evaluation_that_takes_long_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level("INFO")
    throughput = Throughput(clock=clock)
    reporter = Reporter(throughput, clock=clock)
    for done in range(1, 9):
        clock.now += 2
        reporter.show_activity("evaluating", done, 8)
    assert [record.getMessage() for record in caplog.records] == ["evaluating 4/8", "evaluating 7/8"]
    assert throughput.activity is None
    caplog.clear()
    reporter.show_activity("evaluating", 1, 2)
    assert not caplog.records


def test_encoding_says_its_speed_and_what_is_left(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    caplog.set_level("INFO")
    reporter = Reporter(Throughput(clock=clock), clock=clock, interval_s=10)
    for done in range(0, 4000, 500):
        reporter.show_activity("encoding row", done, 4000, with_speed=True)
        clock.now += 4
    assert [record.getMessage() for record in caplog.records] == [
        "encoding row 1500/4000 125/s left 0:20",
        "encoding row 3000/4000 125/s left 0:08",
    ]


def test_a_resumed_run_shows_what_was_measured_last_before_its_first_step(clock: Clock) -> None:
    throughput = Throughput(clock=clock)
    throughput.held_out_loss = 9.0  # of the adapter before training, measured again after the restart
    logged = [{"step": 2, "eval_loss": 3.0}, {"step": 4, "loss": 1.5}, {"step": 4, "eval_loss": 1.25}]
    throughput.start(4, 10, [{"step": 2, "loss": 2.0}, *logged])
    assert (throughput.step, throughput.loss, throughput.held_out_loss) == (4, 1.5, 1.25)
    assert "held-out 1.2500" in throughput.metrics_text()


def test_the_last_step_is_logged_once(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    caplog.set_level("INFO")
    throughput = Throughput(clock=clock)
    reporter = Reporter(throughput, clock=clock)
    throughput.start(0, 2)
    take_step(throughput, 1, clock, 6)
    reporter.record()
    take_step(throughput, 2, clock, 1)
    reporter.record()
    assert len(caplog.records) == 1
    reporter.show(last=True)  # its only line
    reporter.show(last=True)
    assert [record.getMessage().partition(" epoch")[0] for record in caplog.records] == [
        "step 1/2",
        "step 2/2",
    ]
    throughput.log(2, {"eval_loss": 1.0})
    reporter.show(last=True)
    assert "held-out 1.0000" in caplog.records[-1].getMessage()


def test_what_is_not_measured_yet_is_not_shown(clock: Clock) -> None:
    throughput = Throughput(clock=clock)
    throughput.start(0, 2)
    throughput.advance(1, 0.5)
    throughput.learning_rate = 2e-4
    assert throughput.metrics_text().startswith("lr 2.00e-04 0 tokens/s")
    assert "nan" not in throughput.metrics_text()
