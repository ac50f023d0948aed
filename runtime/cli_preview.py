"""What `runtime tune --preview` writes: rows with their trained tokens coloured, and the counts.

On a terminal with colours trained text is green; elsewhere it stands between ⟦ and ⟧. Does not know
tokens. Start at `draw`.
"""

import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text

from runtime.tuning.preview import Preview, Run, Shown

VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters as pictures of themselves: data must not steer the terminal."""

FATES = {
    "whole": "",
    "truncated": ", cut from {full_tokens}",
    "split": ", split from {full_tokens}",
    "too long": "dropped: {full_tokens} tokens are too long",
    "unlabelled": "dropped: no token of it would be trained",
}


def draw(preview: Preview) -> None:
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


def counts(preview: Preview) -> list[str]:
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


def _text(row: Sequence[Run], *, coloured: bool) -> Text:
    text = Text()
    for run in row:
        said = run.text.translate(VISIBLE)
        if coloured:
            text.append(said, "green" if run.trained else "")
        else:
            text.append(f"⟦{said}⟧" if run.trained else said)
    return text


def _title(shown: Shown) -> str:
    note = FATES[shown.fate].format(full_tokens=f"{shown.full_tokens:,}")
    if not shown.rows:
        return f"── {shown.origin}: {note}"
    return f"── {shown.origin}: {shown.tokens:,} tokens{note}, {shown.trained:,} trained"
