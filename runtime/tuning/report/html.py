"""The report of a run as a page people open: one HTML file with nothing from elsewhere and no script.

Shows what `report.build` gathered and adds nothing. All of it is data from outside, so it is escaped.
Start at `render`; the page itself is report.html.jinja beside this file.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from runtime.config import flatten
from runtime.tuning.report.progress import duration

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 16, 40
"""Margins, in which the numbers of the axes stand."""

POINTS = 400
"""Most points of a line: more than this no screen shows."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """From steps and losses to places in the drawing."""

    steps: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps

    def y(self, loss: float) -> float:
        part = (loss - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(part, 0.0), 1.0)

    def line(self, points: Iterable[Point]) -> str:
        """Return the path through `points`."""
        places = [f"{self.x(step):.1f} {self.y(loss):.1f}" for step, loss in points]
        return f"M{' L'.join(places)}" if places else ""


def draw(train: Sequence[Point], held_out: Sequence[Point]) -> Markup:
    """Return the drawing: every logged loss faint, their running mean, and the held-out measurements."""
    raw = thin(train, POINTS)
    mean = smooth(raw)
    scale = _scale(raw, mean, held_out)
    parts = [*_axes(scale), _path(scale, raw, "raw"), _path(scale, mean, "train")]
    parts.append(_path(scale, held_out, "held-out"))
    parts += [
        Markup('<circle class="held-out" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>').format(
            scale.x(step), scale.y(loss), f"step {step:.0f}: held-out loss {loss:.4f}"
        )
        for step, loss in held_out
    ]
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, _words(mean, held_out), Markup("").join(parts)
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return what each point and its neighbours are like, about a twentieth of the run wide."""
    reach = max(1, len(points) // 40)
    found = []
    for place, (step, _) in enumerate(points):
        near = points[max(0, place - reach) : place + reach + 1]
        found.append((step, _centre([loss for _, loss in near])))
    return found


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points, each standing for as many neighbours."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in group) / len(group), _centre([loss for _, loss in group]))
        for group in groups
    ]


def _centre(losses: Sequence[float]) -> float:
    """Return the mean without the highest and the lowest tenth: one wild step is not the run."""
    cut = len(losses) // 10
    kept = sorted(losses)[cut : len(losses) - cut]
    return sum(kept) / len(kept)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers between `low` and `high`, roughly `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / width - 1e-9)
    return [number * width for number in range(first, math.floor(high / width + 1e-9) + 1)]


def _scale(train: Sequence[Point], mean: Sequence[Point], held_out: Sequence[Point]) -> Scale:
    # One wild step must not flatten all others: the highest hundredth may leave the drawing.
    losses = [loss for _, loss in held_out]
    for line in (train, mean):
        losses += sorted(loss for _, loss in line)[: max(1, math.ceil(len(line) * 0.99) - 1)]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    steps = max((step for line in (train, held_out) for step, _ in line), default=1.0)
    return Scale(max(steps, 1.0), max(0.0, low - room), high + room)


def _axes(scale: Scale) -> list[Markup]:
    found = []
    for loss in ticks(scale.low, scale.high, 5):
        y = scale.y(loss)
        found.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{:.6g}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 8, y + 4, loss, y=y)
        )
    found += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:.0f}</text>').format(
            scale.x(step), HEIGHT - BOTTOM + 18, step
        )
        for step in ticks(0, scale.steps, 6)
        if step.is_integer()
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    found.append(Markup('<text x="{}" y="{}" text-anchor="middle">step</text>').format(middle, HEIGHT - 4))
    return found


def _path(scale: Scale, points: Sequence[Point], kind: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, scale.line(points))


def _words(mean: Sequence[Point], held_out: Sequence[Point]) -> str:
    """Return the drawing in words, for those who do not see it."""
    if not mean:
        return "No losses were logged"
    words = f"Training loss from {mean[0][1]:.3f} to {mean[-1][1]:.3f} over {mean[-1][0]:.0f} steps"
    if held_out:
        words += f"; held-out loss from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}"
    return words


TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(report: Mapping[str, Any]) -> str:
    """Return the page for `report`."""
    drawing = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawing.filters.update(number=_number, size=_size, duration=duration, value=_value)
    template = drawing.from_string(TEMPLATE.read_text(encoding="utf-8"))
    settings = [
        {"name": name, "value": value, "source": report["sources"].get(name, "default")}
        for name, value in flatten(report["settings"]).items()
    ]
    curve = report["result"]["curve"]
    return template.render(
        **report,
        chosen=[setting for setting in settings if setting["source"] != "default"],
        defaults=[setting for setting in settings if setting["source"] == "default"],
        drawing=draw(curve["train"], curve["held_out"]),
    )


def _number(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 or not digits else f"{value:.3g}"


def _size(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _value(value: Any) -> str:
    """Return a setting as people write it."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)
