"""The report of a run as a page people open: one HTML file without scripts or outside resources.

Shows what `report.build` gathered and adds nothing. All of it is data from outside, so it is escaped.
Start at `render`; the page itself is report.html.jinja beside this file, its loss curve is chart.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from runtime.config import flatten
from runtime.tuning.report.chart import draw
from runtime.tuning.train.progress import duration

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(report: Mapping[str, Any]) -> str:
    """Return the page for `report`."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(number=_number, size=_size, duration=duration, value=_value)
    template = page.from_string(TEMPLATE.read_text(encoding="utf-8"))
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
