"""Folders that are tables with a history: which of their files hold the rows that the table has today.

Reads Delta's log of commits; refuses Iceberg and Hudi by name, whose files tell nothing without their
metadata. Does not know what is in data files. Start at `current`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from runtime.errors import DataError

_DELTA = "_delta_log"
_ICEBERG = re.compile(r"(v\d+|\d{5}-[0-9a-f-]{36})(\.gz)?\.metadata\.json(\.gz)?|version-hint\.text")
_MOST_LOG_BYTES = 256 << 20
"""Of all commits of a table: a log of a million files."""
_ADVICE = "write its rows to a folder of Parquet files and give that"


def current(folder: Path, found: Sequence[Path]) -> list[Path]:
    """Return those of `found` that are no files of earlier versions of a table in or below `folder`.

    DataError where the files alone do not say which rows a table has.
    """
    left = list(found)
    for inside in sorted(path for path in folder.rglob("*") if path.is_dir()):
        table = inside.parent
        if inside.name == ".hoodie":
            raise DataError(f"{table}: a Hudi table, of which every version's rows lie here; {_ADVICE}")
        if inside.name == "metadata" and any(_ICEBERG.fullmatch(path.name) for path in inside.iterdir()):
            raise DataError(f"{table}: an Iceberg table, of which every version's rows lie here; {_ADVICE}")
        if inside.name == _DELTA:
            live = _live(table)
            if missing := sorted(path for path in live if not path.is_file()):
                raise DataError(
                    f"{table}: a Delta table without {missing[0].relative_to(table)}, which its log names: "
                    "the copy is not complete"
                )
            left = [path for path in left if path in live or table not in path.parents]
    return left


def _live(table: Path) -> set[Path]:
    """Return the files that a Delta table has after its last commit."""
    commits = _commits(table)
    live: set[Path] = set()
    for action in _actions(commits):
        if isinstance(added := action.get("add"), dict):
            if added.get("deletionVector"):
                raise DataError(f"{table}: a Delta table with rows deleted inside its files; {_ADVICE}")
            live.add(_file(table, added))
        if isinstance(removed := action.get("remove"), dict):
            live.discard(_file(table, removed))
    return live


def _commits(table: Path) -> list[Path]:
    """Return the commits of a Delta table, from the first; DataError where earlier ones were cleaned away."""
    log = table / _DELTA
    names = {path.name for path in log.iterdir()}
    numbers = [int(name[:20]) for name in names if re.match(r"\d{20}\.", name)]
    last = max(numbers, default=0)
    commits = [log / f"{number:020}.json" for number in range(min(last + 1, len(names)))]
    if len(commits) <= last or not all(path.name in names for path in commits):
        raise DataError(
            f"{table}: a Delta table whose log has not all commits from 0 to {last}, so which of its files "
            f"hold rows of today is not known; {_ADVICE}"
        )
    if sum(path.stat().st_size for path in commits) > _MOST_LOG_BYTES:
        raise DataError(f"{log}: more than {_MOST_LOG_BYTES >> 20} MiB of commits; {_ADVICE}")
    return commits


def _actions(commits: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for commit in commits:
        with commit.open("rb") as lines:
            for number, line in zip(count(1), lines):
                try:
                    action = json.loads(line) if line.strip() else {}
                except (ValueError, RecursionError):
                    action = None
                if not isinstance(action, dict):
                    raise DataError(f"{commit}: line {number} is no action of a Delta table's log")
                yield action


def _file(table: Path, action: dict[str, Any]) -> Path:
    name = unquote(str(action.get("path")))
    if "://" in name or ".." in name.split("/") or name.startswith("/"):
        raise DataError(f"{table}: a Delta table with files elsewhere ({name}); {_ADVICE}")
    return table / name
