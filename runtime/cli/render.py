"""What a resolved job or server looks like to a person: a heading, a table of settings, warnings.

rich on a terminal, aligned plain text elsewhere, JSON for machines; never a secret or a URL's query.
Start at `job`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from runtime import presets
from runtime.config import flatten
from runtime.logs import redact
from runtime.model_source import ModelSource
from runtime.serving.settings import ServeConfig
from runtime.tuning.settings import DataSource, Output, TuningJob
from runtime.workspace.layers import Resolved

if TYPE_CHECKING:
    from runtime.tuning.data.preview import Preview, PreviewRow, TextRun

__all__ = ["count", "dry_run", "job", "server", "table", "text", "values"]

Job = TypeVar("Job", bound=BaseModel)

LONGEST = 72
"""Characters of a value in a table; a chat template is far longer."""


def dry_run(resolved: Resolved[Job], draw: Callable[[Resolved[Job]], None], *, as_json: bool) -> None:
    """Write what would run to standard output: as `draw` does, or as JSON."""
    if as_json:
        typer.echo(json.dumps(values(resolved), indent=2))
    else:
        draw(resolved)


def job(resolved: Resolved[TuningJob]) -> None:
    """Write a tuning job to standard output."""
    tuning = resolved.config
    _heading(
        f"Tuning job {tuning.name}: {tuning.method} on {tuning.model.name}",
        {"model": _model(tuning.model), "data": _data(tuning.data), "output": _output(tuning.output)},
    )
    _settings(resolved)


def server(resolved: Resolved[ServeConfig]) -> None:
    """Write a server to standard output."""
    config = resolved.config
    adapters = [f"{a.name} = {redact(a.reference)} (strength {a.strength:g})" for a in config.adapters]
    _heading(
        f"Server of {config.served_name} on {config.host} port {config.port}",
        {"model": _model(config.model), "adapters": "; ".join(adapters) or "none"},
    )
    _settings(resolved)


def values(resolved: Resolved[Any]) -> dict[str, Any]:
    """Return the job, the sources and the warnings as JSON values."""
    values = {name: _clean(value) for name, value in _values(resolved.config).items()}
    return {
        "settings": {
            name: {"value": value, "source": resolved.sources.get(name, "default")}
            for name, value in values.items()
        },
        "warnings": list(resolved.warnings),
        "placeholders": list(resolved.placeholders),
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows under column names: a rich table on a terminal, aligned text elsewhere."""
    rows = list(rows)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def text(value: Any) -> str:
    """Return a value as one short cell."""
    if value is None or value in ([], {}, ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(str(item) for item in value)
    line = redact(" ".join(str(value).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def count(number: int) -> str:
    """Return a parameter count as people write it: 135M, 3.8B."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def _heading(title: str, lines: Mapping[str, str]) -> None:
    typer.echo(title)
    for name, line in lines.items():
        typer.echo(f"  {name:<9}{line}")
    typer.echo()


def _settings(resolved: Resolved[Any]) -> None:
    rows = [
        (name, text(value), resolved.sources.get(name, "default"))
        for name, value in _values(resolved.config).items()
    ]
    table(("setting", "value", "from"), rows)
    if resolved.warnings or resolved.placeholders:
        typer.echo()
    for warning in resolved.warnings:
        typer.echo(f"warning: {warning}")
    for left in resolved.placeholders:
        typer.echo(f"placeholder: {left}")


def _values(value: BaseModel) -> dict[str, Any]:
    return flatten(value.model_dump(mode="json", exclude={"sources"}))


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _model(model: ModelSource) -> str:
    where = str(model.path or model.image or model.repository)
    if model.repository and model.revision:
        where = f"{model.repository} @ {model.revision}"
    preset = presets.matching(model)
    if preset is None:
        return where
    size = f"{count(preset.dimensions.parameters)} parameters, {preset.download_gib:g} GiB"
    gated = ", gated" if preset.gated else ""
    return f"{where} ({preset.licence}{gated}, {size}, {preset.context_tokens} tokens of context)"


def _data(data: DataSource) -> str:
    if data.urls:
        return ", ".join(redact(url) for url in data.urls)
    return str(data.image or data.file or data.folder)


def _output(output: Output) -> str:
    return f"{output.folder}, pushed to {output.image}" if output.image else str(output.folder)


VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters as pictures of themselves: data must not steer the terminal."""

FATES = {
    "whole": "",
    "truncated": ", cut from {full_tokens}",
    "split": ", split from {full_tokens}",
    "too long": "dropped: {full_tokens} tokens are too long",
    "unlabelled": "dropped: no token of it would be trained",
}


def draw(preview: "Preview") -> None:
    """Write `preview` to standard output."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    legend = "green" if coloured else "between ⟦ and ⟧"
    for shown in preview.shown:
        console.print(Text(_title(shown), style="bold"))
        for number, row in enumerate(shown.rows):
            if number:
                console.print(Text("— next piece —", style="dim"))
            console.print(_text(row, coloured=coloured))
        console.print()
    typer.echo(f"What is trained on is {legend}.")
    for line in counts(preview):
        typer.echo(line)


def counts(preview: "Preview") -> list[str]:
    """Return the figures, a line each."""
    data, fates = preview.data, preview.fates
    share = f"{preview.trained / preview.tokens:.0%}" if preview.tokens else "0%"
    examined = "all" if preview.counted == preview.train_rows else f"the first {preview.counted:,}"
    files = f"{len(data.files)} file{'' if len(data.files) == 1 else 's'}"
    lines = [
        f"rows     {len(data.examples):,} from {files}: {preview.train_rows:,} to train on, "
        f"{preview.held_out_rows:,} held out, {data.skipped:,} skipped as bad",
        f"tokens   {preview.tokens:,}, {preview.trained:,} of them trained ({share}), "
        f"in {examined} training rows",
        f"length   at most {preview.max_tokens:,} tokens: {fates['truncated'] + fates['split']:,} rows cut, "
        f"{fates['too long']:,} dropped as too long, {fates['unlabelled']:,} dropped without a trained token",
    ]
    if preview.dropped * 2 > preview.counted:
        lines.append("warning  more than half of the rows teach nothing: training refuses such data")
    return lines


def _text(row: "Sequence[TextRun]", *, coloured: bool) -> Text:
    text = Text()
    for run in row:
        said = run.text.translate(VISIBLE)
        if coloured:
            text.append(said, "green" if run.trained else "")
        else:
            text.append(f"⟦{said}⟧" if run.trained else said)
    return text


def _title(shown: "PreviewRow") -> str:
    note = FATES[shown.fate].format(full_tokens=f"{shown.full_tokens:,}")
    if not shown.rows:
        return f"── {shown.origin}: {note}"
    return f"── {shown.origin}: {shown.tokens:,} tokens{note}, {shown.trained:,} trained"
