"""What a run's losses and sample answers say: learnt, still falling, overfit, nothing learnt, or not to tell.

The rules and their thresholds, for numbers alone. Does not know where the losses come from, nor who reads
the sentence. Start at `judge`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from runtime.logs import counted
from runtime.tuning.report.chart import Point
from runtime.tuning.train.progress import duration

Kind = Literal[
    "learnt",
    "still falling",
    "overfit",
    "nothing learnt",
    "still high",
    "endless answers",
    "too few rows",
    "not measured",
]

LEAST_ROWS = 5
"""With fewer held-out rows one odd row decides the loss."""
LEAST_FALL = 0.01
"""A held-out loss that has not fallen by this part of itself has not fallen."""
LEAST_RISE = 0.02
"""Over its minimum, as a part of it and of the whole fall: less is noise, or a curve that is level."""
LATE = 0.75
"""The end of a run begins after this part of its steps."""
LATE_FALL = 0.05
"""Of the whole fall, in the end of the run: a curve that falls that much there has not arrived."""


SHORT_STEPS, SHORT_EPOCHS = 20, 1
"""A run of fewer tells little."""
HIGH_PERPLEXITY = 100
"""A model that answers like the data is far below this."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the losses of a run say."""

    kind: Kind
    text: str
    """One line, with what to do next."""


@dataclass(frozen=True, slots=True)
class Endings:
    """How many of the sample answers did not end, where the data's own answers are short."""

    answers: int = 0
    """Those that tell."""
    endless_before: int = 0
    endless_after: int = 0

    def __str__(self) -> str:
        count = f"{self.endless_after} of {counted(self.answers, 'sample answer')}"
        return f"{count} did not end where the data's do ({self.endless_before} before training)"


def judge(
    held_out: Sequence[Point],
    *,
    held_out_rows: int,
    kept_step: int | None = None,
    epochs: float = math.inf,
    endings: Endings = Endings(),
) -> Verdict:
    """Return what the held-out losses (from before training to after it) of so many rows say.

    `kept_step` is the step whose weights were kept, where that is not the last one; `epochs` how often the
    run saw the rows; `endings` those of its sample answers.

    The rules, in order: too few rows; it never fell; it rose again by the end; it fell to the end; it is far
    from the data; else it was learnt. Only a curve measured between beginning and end tells how it ended.
    What was learnt is not the data where most answers do not end, which the loss of one token in each hides.
    """
    verdict = _judge_losses(held_out, held_out_rows, kept_step, epochs=epochs)
    if not endings.endless_after:
        return verdict
    if verdict.kind != "learnt" or 2 * endings.endless_after <= endings.answers:
        return replace(verdict, text=f"{verdict.text}; {endings}")
    learnt = verdict.text.partition(": ")[2]
    return Verdict(
        "endless answers",
        f"endless answers: {learnt}, but {endings}; train longer, or look with --preview 3 whether the end "
        "of each answer is trained",
    )


def _judge_losses(
    held_out: Sequence[Point], held_out_rows: int, kept_step: int | None, *, epochs: float
) -> Verdict:
    """Return what the losses say by themselves."""
    if held_out_rows < LEAST_ROWS or len(held_out) < 2:
        return _too_few(held_out_rows)
    before, after = held_out[0][1], held_out[-1][1]
    best_step, best = min(held_out, key=lambda point: point[1])
    if before - best <= LEAST_FALL * before:
        return _nothing(before, after, short=_short(held_out[-1][0], epochs))
    if after - best > LEAST_RISE * max(best, before - best):
        remedy = (
            f"train shorter (max_steps={best_step:.0f}), on more rows, or with a lower learning_rate"
            if kept_step is None
            else f"the adapter is that of step {kept_step}; more rows would go further"
        )
        where = f"overfit from step {best_step:.0f} on, where the held-out loss was lowest ({best:.3f})"
        return Verdict("overfit", f"{where}: {remedy}")
    late = _at(held_out, LATE * held_out[-1][0])
    if late is not None and late - after > max(LATE_FALL * (before - after), LEAST_FALL * after):
        return Verdict(
            "still falling",
            f"still falling: the last quarter of the steps took {late - after:.3f} off the held-out loss; "
            "train longer (a higher num_train_epochs)",
        )
    there = " and is level" if late is not None else ""
    fell = f"the held-out loss fell by {1 - after / before:.0%}{there}"
    if after > math.log(HIGH_PERPLEXITY):
        return _high(fell, after, short=_short(held_out[-1][0], epochs))
    return Verdict("learnt", f"learnt: {fell}")


def summary(report: Mapping[str, Any]) -> str:
    """Return the end of a run in one line: its name, the held-out loss before and after, the verdict."""
    result = report["result"]
    loss = result["held_out_loss"]
    measured = "" if loss["before"] is None else _change(loss["before"], loss["after"])
    steps = f"{counted(result['steps'], 'step')} in {duration(result['seconds'])}"
    return f"{report['run']}: {measured}{steps}; {report['verdict']['text']}"


def _change(before: float, after: float) -> str:
    change = round(100 * (after / before - 1)) if before else 0
    share = f" ({change:+d}%)" if change else ""
    return f"held-out loss {before:.3f} before, {after:.3f} after{share}; "


def _too_few(rows: int) -> Verdict:
    if not rows:
        return Verdict(
            "not measured", "not measured: no rows are held out; train_test_split=0.9 holds a tenth out"
        )
    return Verdict(
        "too few rows",
        f"too few rows to tell: only {counted(rows, 'row')} held out, where {LEAST_ROWS} or more show "
        "whether the model learnt or memorised; train_test_split=0.9 holds a tenth out",
    )


def _high(fell: str, loss: float, *, short: str) -> Verdict:
    why = f"; {short}" if short else ""
    return Verdict(
        "still high",
        f"still high: {fell}, but a perplexity of {math.exp(min(loss, 700)):,.0f} is far from the data{why}; "
        "train longer, or look at what is trained with --preview 3",
    )


def _short(steps: float, epochs: float) -> str:
    """Return that the run was short, "" where it was not."""
    if steps >= SHORT_STEPS and epochs >= SHORT_EPOCHS:
        return ""
    seen = f" of {epochs:.2g} epochs" if epochs < SHORT_EPOCHS else ""
    return f"the run was short ({counted(int(steps), 'step')}{seen})"


def _nothing(before: float, after: float, *, short: str) -> Verdict:
    if after - before > LEAST_RISE * before:
        return Verdict(
            "nothing learnt",
            f"nothing learnt: the held-out loss rose from {before:.3f} to {after:.3f}; lower learning_rate",
        )
    fell = "hardly fell" if after < before else "did not fall"
    remedy = (
        f"{short}; train longer"
        if short
        else "look at what is trained with --preview 3, then raise learning_rate or train longer"
    )
    return Verdict(
        "nothing learnt",
        f"nothing learnt: the held-out loss {fell} ({before:.3f} to {after:.3f}); {remedy}",
    )


def _at(curve: Sequence[Point], step: float) -> float | None:
    """Return the loss at `step`, between the measurements around it; None where the second half has none."""
    last = curve[-1][0]
    if not any(last / 2 <= point[0] < last for point in curve):
        return None
    for (left, high), (right, low) in pairwise(curve):
        if left <= step <= right:
            part = (step - left) / (right - left) if right > left else 0.0
            return high + (low - high) * part
    return None
