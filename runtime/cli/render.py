"""What commands write to standard output: a resolved job or server, a preview of training rows, tables.

rich on a terminal, aligned plain text elsewhere, JSON for machines; never a secret or a URL's query.
Start at `dry_run` and `preview`; `table` and `cell` serve the other commands too.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from pydantic import BaseModel

from runtime import presets
from runtime.config import flatten
from runtime.logs import counted, printable
from runtime.model_source import ModelSource
from runtime.redaction import redact
from runtime.serving.settings import ServeConfig
from runtime.tuning.settings import DataSource, Output, TuningJob
from runtime.workspace.layers import Resolved

if TYPE_CHECKING:
    from rich.text import Text

    from runtime.tuning.data.normalise import RowFacts
    from runtime.tuning.data.preview import Preview, PreviewExample, TextRun

Config = TypeVar("Config", bound=BaseModel)

LONGEST_CELL = 72
"""Characters of a value in a table; a chat template is far longer."""

MOST_SHAPES, MOST_NAMES = 5, 20
"""Shapes of rows, and names of what is not used, that a preview lists."""

_IN_ONE_LINE = {ord("\n"): "␊", ord("\t"): "␉"}

OUTCOMES = {
    "whole": "",
    "truncated": ", cut from {full_tokens}",
    "split": ", split from {full_tokens}",
    "too long": "dropped: {full_tokens} tokens are too long",
    "unlabelled": "dropped: no token of it would be trained",
}
"""What the title of a previewed row adds for each outcome of its encoding."""


# --- a resolved job or server --------------------------------------------------------------------


def dry_run(
    resolved: Resolved[Config], as_text: Callable[[Resolved[Config]], None], *, as_json: bool
) -> None:
    """Write what would run to standard output, with `as_text` or as JSON."""
    if as_json:
        typer.echo(json.dumps(json_values(resolved), indent=2))
    else:
        as_text(resolved)


def tuning_job(resolved: Resolved[TuningJob]) -> None:
    """Write a tuning job to standard output."""
    job = resolved.config
    _heading(
        f"Tuning job {job.name}: {job.method} on {job.model.name}",
        {"model": _model(job.model), "data": _data(job.data), "output": _output(job.output)},
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


def json_values(resolved: Resolved[Any]) -> dict[str, Any]:
    """Return the settings, their sources and the warnings as JSON values."""
    values = {name: _redacted(value) for name, value in _values(resolved.config).items()}
    return {
        "settings": {
            name: {"value": value, "source": resolved.sources.get(name, "default")}
            for name, value in values.items()
        },
        "warnings": list(resolved.warnings),
        "placeholders": list(resolved.placeholders),
    }


def _heading(title: str, lines: Mapping[str, str]) -> None:
    typer.echo(title)
    for name, line in lines.items():
        typer.echo(f"  {name:<9}{line}")
    typer.echo()


def _settings(resolved: Resolved[Any]) -> None:
    rows = [
        (name, cell(value), resolved.sources.get(name, "default"))
        for name, value in _values(resolved.config).items()
    ]
    table(("setting", "value", "from"), rows)
    if resolved.warnings or resolved.placeholders:
        typer.echo()
    for warning in resolved.warnings:
        typer.echo(f"warning: {warning}")
    for line in resolved.unfilled:
        typer.echo(line)


def _values(config: BaseModel) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json", exclude={"sources"}))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    return [_redacted(item) for item in value] if isinstance(value, list) else value


def _model(model: ModelSource) -> str:
    where = str(model.path or model.image or model.repository)
    if model.repository and model.revision:
        where = f"{model.repository} @ {model.revision}"
    preset = presets.matching(model)
    if preset is None:
        return where
    size = f"{parameter_count(preset.parameters)} parameters, {preset.download_gib:g} GiB"
    gated = ", gated" if preset.gated else ""
    return f"{where} ({preset.licence}{gated}, {size}, {preset.context_tokens} tokens of context)"


def _data(data: DataSource) -> str:
    if data.urls:
        return ", ".join(redact(url) for url in data.urls)
    return str(data.image or data.file or data.folder)


def _output(output: Output) -> str:
    return f"{output.folder}, pushed to {output.image}" if output.image else str(output.folder)


# --- a preview of training rows ------------------------------------------------------------------


def preview(preview: "Preview") -> None:
    """Write the previewed rows, with the trained tokens marked, and the counts to standard output."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    for example in preview.examples:
        console.print(Text(_title(example), style="bold"))
        for number, sequence in enumerate(example.sequences):
            if number:
                part = "part" if example.outcome == "split" else "sequence"
                console.print(Text(f"— next {part} —", style="dim"))
            console.print(_marked(sequence, coloured=coloured))
        console.print()
    typer.echo(f"Trained tokens are {'green' if coloured else 'between ⟦ and ⟧'}.")
    for line in preview_counts(preview):
        typer.echo(line)


def preview_counts(preview: "Preview") -> list[str]:
    """Return the counts, one line each."""
    data, outcomes = preview.data, preview.outcomes
    share = f"{preview.labelled_tokens / preview.tokens:.0%}" if preview.tokens else "0%"
    examined = "all" if preview.counted == preview.train_rows else f"the first {preview.counted:,}"
    files = counted(len(data.files), "file")
    lines = [
        f"rows     {data.rows:,} from {files}: {preview.train_rows:,} to train on, "
        f"{preview.held_out_rows:,} held out, {data.skipped:,} skipped as bad",
        f"tokens   {preview.tokens:,}, {preview.labelled_tokens:,} of them trained ({share}), "
        f"in {examined} training rows",
        f"length   at most {preview.max_tokens:,} tokens: {outcomes['truncated'] + outcomes['split']:,} rows "
        f"cut, {outcomes['too long']:,} dropped as too long, {outcomes['unlabelled']:,} dropped without a "
        "trained token",
    ]
    lines += _columns_used(data.facts)
    kept = preview.counted - preview.dropped
    if preview.sequences != kept:
        lines.append(f"divided  {counted(kept, 'row')} became {counted(preview.sequences, 'sequence')}")
    if preview.dropped * 2 > preview.counted:
        lines.append("warning  more than half of the rows are dropped: training refuses such data")
    return lines


def _columns_used(facts: "RowFacts") -> list[str]:
    """Return which columns the rows were made of, and what of them is not used, one line each."""
    shapes = [f"{columns} ({counted(count, 'row')})" for columns, count in facts.columns.items()]
    lines = [f"columns  {shape}" for shape in shapes[:MOST_SHAPES]]
    if len(shapes) > MOST_SHAPES:
        lines.append(f"columns  and {len(shapes) - MOST_SHAPES} other shapes of rows")
    for names, what in ((facts.unused, "columns"), (facts.ignored_fields, "fields of messages")):
        if names:
            more = ", …" if len(names) > MOST_NAMES else ""
            lines.append(f"unused   {what} {', '.join(names[:MOST_NAMES])}{more}")
    return [printable(line).translate(_IN_ONE_LINE) for line in lines]


def _title(example: "PreviewExample") -> str:
    note = OUTCOMES[example.outcome].format(full_tokens=f"{example.full_tokens:,}")
    if not example.sequences:
        return f"── {example.origin}: {note}"
    return f"── {example.origin}: {example.tokens:,} tokens{note}, {example.labelled_tokens:,} trained"


def _marked(row: "Sequence[TextRun]", *, coloured: bool) -> "Text":
    from rich.text import Text

    marked = Text()
    for run in row:
        text = printable(run.text)
        if coloured:
            marked.append(text, "green" if run.labelled else "")
        else:
            marked.append(f"⟦{text}⟧" if run.labelled else text)
    return marked


# --- tables and cells ----------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows under column names: a rich table on a terminal, aligned text elsewhere."""
    rows = [[printable(cell).translate(_IN_ONE_LINE) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    widths = [max(len(row[column]) for row in (columns, *rows)) for column in range(len(columns))]
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def cell(value: Any, *, whole: bool = False) -> str:
    """Return a value as one cell of a table, short unless the `whole` of it is asked for."""
    if value is None or value in ([], {}, ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(str(item) for item in value)
    line = redact(" ".join(str(value).split()))
    return line if whole or len(line) <= LONGEST_CELL else f"{line[: LONGEST_CELL - 3]}..."


def parameter_count(number: int) -> str:
    """Return a parameter count as people write it: 135M, 3.8B."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"
