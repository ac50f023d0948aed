"""The table of a run and the tracebacks of what failed, short enough for the end of a terminal or a log.

Start at `text`.
"""

from typing import Any

MOST_LINES, MOST_COLUMNS = 60, 140
MOST_TRACEBACKS, TRACEBACK_CHARACTERS = 4, 2800
"""Of all tracebacks together: with the table less than 12,000, what the tail of a log commonly keeps."""
LAST_LINES = 15

Line = dict[str, Any]


def text(lines: list[Line], logs: dict[int, str]) -> str:
    """Return the report of the results' `lines`; `logs` has what each step printed, by its number."""
    return "\n".join([*_failures(lines, logs), *_table(lines)])


def _table(lines: list[Line]) -> list[str]:
    """Return one row a case: its figures, a fault, or why there are none."""
    alike = [line for line in lines if _COMPARED & line.keys() and "fault" not in line]
    rows = [_row(line) for line in lines if "case" in line and line not in alike]
    rows = [*_compared(alike), *rows]
    rows += [f"{line['step']}  step {line['ended']}" for line in lines if line.get("ended", "done") != "done"]
    if len(rows) <= MOST_LINES:
        return rows
    return [*rows[: MOST_LINES - 1], f"… {len(rows) - MOST_LINES + 1} more rows in the results file"]


def _compared(lines: list[Line]) -> list[str]:
    """Return one row for each kind of case that compares, with the largest difference: there are many."""
    rows = []
    for kind in dict.fromkeys(line["case"].partition(" ")[0] for line in lines):
        mine = [line for line in lines if line["case"].startswith(kind)]
        for name in sorted(_COMPARED & mine[0].keys()):
            worst = max(mine, key=lambda line: line[name])
            said = f"{len(mine)} cases right, most {name} {_short(worst[name])} in {worst['case']}"
            rows.append(f"{worst['step']}  {kind:<28} {said}"[:MOST_COLUMNS])
    return rows


_COMPARED = {"gradient_error", "gap_share"}


def _row(line: Line) -> str:
    said = [f"{word.replace('_', ' ').upper()}: {line[word]}" for word in _NOT_FIGURES if word in line]
    figures = [
        f"{name} {_short(value)}"
        for name, value in line.items()
        if name not in ("step", "case", "traceback", "took_s", *_NOT_FIGURES)
        and not isinstance(value, dict | list)
    ]
    return f"{line['step']}  {line['case']:<28} {'  '.join([*said, *figures])}"[:MOST_COLUMNS]


_NOT_FIGURES = ("fault", "error", "left_out", "not_here")


def _short(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _failures(lines: list[Line], logs: dict[int, str]) -> list[str]:
    """Return the last lines of each traceback, and of the output of each step that ended without one."""
    found = [
        (f"step {line['step']}, {line['case']}", line["traceback"]) for line in lines if "traceback" in line
    ]
    found = list({printed[-1]: (title, printed) for title, printed in reversed(found)}.values())[::-1]
    told = {line["step"] for line in lines if "traceback" in line or "fault" in line}
    for line in lines:
        if line.get("ended", "done") not in ("done", "left out") and line["step"] not in told:
            printed = logs.get(line["step"], "").rstrip().splitlines()
            found.append((f"step {line['step']} {line['ended']}", printed[-LAST_LINES:]))
    shown, more = found[:MOST_TRACEBACKS], found[MOST_TRACEBACKS:]
    room = TRACEBACK_CHARACTERS // max(len(shown), 1)
    parts = [part for title, printed in shown for part in (f"--- {title}", "\n".join(printed)[-room:])]
    return [*parts, f"--- and {len(more)} more, in the logs"] if more else parts
