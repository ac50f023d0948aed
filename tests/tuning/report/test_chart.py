"""The loss curve: any data gives a chart, of bounded size and with round axes."""

import re

import pytest

from runtime.tuning.report import chart


def test_short_and_flat_runs_have_a_curve_too() -> None:
    for train, held_out in (([], []), ([(1, 2.0)], []), ([(1, 2.0), (2, 2.0)], [(0, 2.0), (2, 2.0)])):
        drawing = chart.draw(train, held_out)
        assert "nan" not in drawing
        assert drawing.startswith("<svg")


def test_curve_of_a_long_run_stays_small_and_one_outlier_does_not_flatten_it() -> None:
    train = [(step, 2.0 - step / 1e5) for step in range(1, 100_001)]
    train[50_000] = (50_001, 1e9)
    drawing = chart.draw(train, [(0, 2.0), (100_000, 1.1)])
    assert len(drawing) < 30_000
    labels = [float(found) for found in re.findall(r'text-anchor="end">([^<]+)<', drawing)]
    assert max(labels) < 3


def test_ticks_are_round_and_inside() -> None:
    assert chart.ticks(0.97, 2.7, 5) == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert chart.ticks(0, 360, 6) == pytest.approx([0, 100, 200, 300])
