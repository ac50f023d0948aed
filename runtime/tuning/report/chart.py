"""The loss curve of a run, drawn as SVG.

Knows numbers only; thins and smooths them to what a screen can show. Start at `draw`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 16, 40
"""Margins, which hold the numbers of the axes."""

POINTS = 400
"""Most points of a line: a screen shows no more."""

Point = tuple[float, float]
"""(step, loss)"""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps steps and losses to coordinates of the drawing."""

    steps: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps

    def y(self, loss: float) -> float:
        part = (loss - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(part, 0.0), 1.0)

    def line(self, points: Iterable[Point]) -> str:
        """Return the SVG path through `points`."""
        coordinates = [f"{self.x(step):.1f} {self.y(loss):.1f}" for step, loss in points]
        return f"M{' L'.join(coordinates)}" if coordinates else ""


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
        WIDTH, HEIGHT, _description(mean, held_out), Markup("").join(parts)
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the trimmed running mean, over windows of about a twentieth of the run."""
    reach = max(1, len(points) // 40)
    smoothed = []
    for index, (step, _) in enumerate(points):
        window = points[max(0, index - reach) : index + reach + 1]
        smoothed.append((step, _trimmed_mean([loss for _, loss in window])))
    return smoothed


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points, each the mean of equally many neighbours."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in group) / len(group), _trimmed_mean([loss for _, loss in group]))
        for group in groups
    ]


def _trimmed_mean(losses: Sequence[float]) -> float:
    """Return the mean without the highest and the lowest tenth, so that outliers do not count."""
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
    # An outlier must not flatten the curve: the highest hundredth may leave the drawing.
    losses = [loss for _, loss in held_out]
    for line in (train, mean):
        losses += sorted(loss for _, loss in line)[: max(1, math.ceil(len(line) * 0.99) - 1)]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    steps = max((step for line in (train, held_out) for step, _ in line), default=1.0)
    return Scale(max(steps, 1.0), max(0.0, low - room), high + room)


def _axes(scale: Scale) -> list[Markup]:
    parts = []
    for loss in ticks(scale.low, scale.high, 5):
        y = scale.y(loss)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{:.6g}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 8, y + 4, loss, y=y)
        )
    parts += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:.0f}</text>').format(
            scale.x(step), HEIGHT - BOTTOM + 18, step
        )
        for step in ticks(0, scale.steps, 6)
        if step.is_integer()
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">step</text>').format(middle, HEIGHT - 4))
    return parts


def _path(scale: Scale, points: Sequence[Point], kind: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, scale.line(points))


def _description(mean: Sequence[Point], held_out: Sequence[Point]) -> str:
    """Return the drawing as text, for screen readers."""
    if not mean:
        return "No losses were logged"
    text = f"Training loss from {mean[0][1]:.3f} to {mean[-1][1]:.3f} over {mean[-1][0]:.0f} steps"
    if held_out:
        text += f"; held-out loss from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}"
    return text
