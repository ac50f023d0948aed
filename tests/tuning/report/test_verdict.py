"""The verdict on a run's losses: each rule on made curves, and the noise that must not decide."""

import math

import pytest

from runtime.tuning.report.chart import Point
from runtime.tuning.report.verdict import Endings, Kind, judge, summary

STEPS = 400
POINTS = 10


def curve(loss: "object") -> tuple[Point, ...]:
    """Return the losses of `loss(part of the run)`, measured before, eight times between and after."""
    parts = [number / (POINTS - 1) for number in range(POINTS)]
    return tuple((round(part * STEPS), loss(part)) for part in parts)  # type: ignore[operator]


CURVES: list[tuple[str, Kind, object]] = [
    ("falls and levels off", "learnt", lambda t: 1.0 + 1.5 * math.exp(-12 * t)),
    ("falls to a small loss and levels off", "learnt", lambda t: 0.02 + 2.5 * math.exp(-14 * t)),
    ("rises a little over its minimum", "learnt", lambda t: 1.0 + 1.5 * math.exp(-12 * t) + 0.012 * t),
    ("is level with noise", "learnt", lambda t: 1.0 + 1.5 * math.exp(-14 * t) + 0.008 * math.sin(40 * t)),
    ("falls in a line", "still falling", lambda t: 2.5 - t),
    ("falls slowly, exponentially", "still falling", lambda t: 1.0 + 1.5 * math.exp(-2 * t)),
    ("turns in the middle", "overfit", lambda t: 1.2 + 2 * (t - 0.5) ** 2),
    ("turns late", "overfit", lambda t: 1.2 + 1.6 * abs(t - 0.8)),
    (
        "turns early and ends above its beginning",
        "overfit",
        lambda t: 2.0 - 0.8 * t if t < 0.2 else 1.6 + 2 * t,
    ),
    ("is flat", "nothing learnt", lambda t: 2.31),
    ("falls by less than a hundredth", "nothing learnt", lambda t: 2.31 - 0.01 * t),
    ("rises from the beginning", "nothing learnt", lambda t: 2.31 + t),
]


@pytest.mark.parametrize(("kind", "loss"), [c[1:] for c in CURVES], ids=[c[0] for c in CURVES])
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_every_shape_has_its_verdict_at_every_scale(kind: Kind, loss: object, scale: float) -> None:
    points = tuple((step, value * scale) for step, value in curve(loss))
    verdict = judge(points, held_out_rows=50)
    assert verdict.kind == kind, verdict
    assert verdict.text.startswith(kind)


def test_the_step_of_the_minimum_is_named() -> None:
    points = ((0, 2.5), (100, 1.4), (200, 1.2), (300, 1.5), (400, 1.9))
    assert (
        "overfit from step 200 on, where the held-out loss was lowest (1.200)"
        in judge(points, held_out_rows=20).text
    )
    assert "max_steps=200" in judge(points, held_out_rows=20).text


def test_a_rise_from_the_beginning_is_answered_with_the_learning_rate() -> None:
    assert "lower learning_rate" in judge(((0, 2.0), (10, 3.0)), held_out_rows=20).text
    assert "--preview" in judge(((0, 2.0), (30, 2.0)), held_out_rows=20).text


@pytest.mark.parametrize(("rows", "words"), [(1, "only 1 row held out"), (4, "4 rows")])
def test_too_few_rows_tell_nothing(rows: int, words: str) -> None:
    points = ((0, 2.5), (10, 1.0)) if rows else ()
    verdict = judge(points, held_out_rows=rows)
    assert verdict.kind == "too few rows"
    assert verdict.text.startswith("too few rows to tell")
    assert words in verdict.text


def test_two_measurements_do_not_tell_how_the_curve_ended() -> None:
    assert judge(((0, 2.5), (4, 1.0)), held_out_rows=10).kind == "learnt"
    assert judge(((0, 2.5), (1, 2.2), (4, 1.0)), held_out_rows=10).kind == "learnt"


def test_the_summary_is_one_line_with_before_and_after() -> None:
    report = {
        "run": "tickets-20261130-1132",
        "result": {"held_out_loss": {"before": 2.0, "after": 1.0}, "steps": 54, "seconds": 133.0},
        "verdict": {"kind": "learnt", "text": "learnt: so it is"},
    }
    assert summary(report) == (
        "tickets-20261130-1132: held-out loss 2.000 before, 1.000 after (-50%); 54 steps in 2:13; "
        "learnt: so it is"
    )
    report["result"] = {"held_out_loss": {"before": None, "after": None}, "steps": 1, "seconds": 3.0}
    assert summary(report) == "tickets-20261130-1132: 1 step in 0:03; learnt: so it is"


def test_overfit_run_that_keeps_its_best_step_needs_no_shorter_one() -> None:
    turned = curve(lambda t: 1.2 + 2 * (t - 0.5) ** 2)
    found = judge(turned, held_out_rows=50, kept_step=178)
    assert found.kind == "overfit"
    assert found.text.endswith("the adapter is that of step 178; more rows would go further")


def test_without_held_out_rows_nothing_is_measured() -> None:
    verdict = judge((), held_out_rows=0)
    assert verdict.kind == "not measured"
    assert verdict.text.startswith("not measured: no rows are held out; ")


def test_a_short_run_that_hardly_fell_is_called_short() -> None:
    text = judge(((0, 6.256), (4, 6.228)), held_out_rows=20, epochs=0.11).text
    assert "hardly fell (6.256 to 6.228); the run was short (4 steps of 0.11 epochs); train longer" in text
    assert "short" not in judge(((0, 2.0), (100, 2.0)), held_out_rows=20, epochs=3.0).text


def test_a_fall_that_leaves_the_model_far_off_is_not_called_learnt() -> None:
    verdict = judge(((0, 6.256), (30, 5.92), (40, 5.911)), held_out_rows=20, epochs=2)
    assert verdict.kind == "still high"
    assert "fell by 6% and is level, but a perplexity of 369 is far from the data" in verdict.text


def test_a_change_that_rounds_to_nothing_has_no_sign() -> None:
    result = {"held_out_loss": {"before": 6.256, "after": 6.228}, "steps": 4, "seconds": 3.0}
    line = summary({"run": "x", "result": result, "verdict": {"text": "t"}})
    assert line == "x: held-out loss 6.256 before, 6.228 after; 4 steps in 0:03; t"


FALLEN = ((0, 2.5), (100, 1.2), (200, 1.1), (300, 1.1), (400, 1.1))


def test_a_model_whose_answers_do_not_end_has_not_learnt_the_data() -> None:
    found = judge(FALLEN, held_out_rows=20, endings=Endings(5, 5, 4))
    assert found.kind == "endless answers"
    assert "fell by 56% and is level, but 4 of 5 sample answers did not end where the data's" in found.text
    assert "(5 before training)" in found.text
    plain = judge(FALLEN, held_out_rows=20)
    assert plain.kind == "learnt"
    assert plain == judge(FALLEN, held_out_rows=20, endings=Endings(5, 5, 0))


def test_some_answers_without_an_end_are_said_beside_any_verdict() -> None:
    few = judge(FALLEN, held_out_rows=20, endings=Endings(5, 5, 2))
    assert few.kind == "learnt"
    assert few.text.endswith("; 2 of 5 sample answers did not end where the data's do (5 before training)")
    unmeasured = judge((), held_out_rows=0, endings=Endings(5, 3, 3))
    assert unmeasured.kind == "not measured"
    assert "3 of 5 sample answers did not end" in unmeasured.text
