"""Of tables with a history the rows of today are trained on, or the table is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import DataError
from runtime.tuning.data import lakes

Action = dict[str, Any]


def add(path: str, **more: Any) -> Action:
    return {"add": {"path": path, "dataChange": True, **more}}


def remove(path: str) -> Action:
    return {"remove": {"path": path, "dataChange": True}}


def table(folder: Path, *commits: list[Action], files: tuple[str, ...] = ("a", "b", "c d")) -> list[Path]:
    log = folder / "_delta_log"
    log.mkdir()
    for number, actions in enumerate(commits):
        lines = [json.dumps(action) for action in ({"commitInfo": {}}, *actions)]
        (log / f"{number:020}.json").write_text("\n".join(lines) + "\n")
    present = [folder / f"{name}.parquet" for name in files]
    for path in present:
        path.touch()
    return present


def current(folder: Path, found: list[Path]) -> list[str]:
    return [path.name for path in lakes.current(folder, found)]


@pytest.mark.parametrize(
    ("commits", "expected"),
    [
        ([[add("a.parquet")], [add("b.parquet")]], ["a.parquet", "b.parquet"]),
        ([[add("a.parquet")], [remove("a.parquet"), add("b.parquet")]], ["b.parquet"]),
        ([[add("a.parquet")], [remove("a.parquet")], [add("a.parquet")]], ["a.parquet"]),
        ([[add("c%20d.parquet")]], ["c d.parquet"]),
        ([[{"metaData": {}, "protocol": None}]], []),
    ],
)
def test_a_delta_table_is_the_files_that_its_commits_leave(
    tmp_path: Path, commits: list[list[Action]], expected: list[str]
) -> None:
    assert current(tmp_path, table(tmp_path, *commits)) == expected


def test_commits_that_are_all_there_need_no_checkpoint(tmp_path: Path) -> None:
    found = table(tmp_path, [add("a.parquet"), add("b.parquet")], [remove("a.parquet")])
    log = tmp_path / "_delta_log"
    for name in (f"{1:020}.checkpoint.parquet", "_last_checkpoint", f"{1:020}.crc", "_sidecars"):
        (log / name).touch()
    assert current(tmp_path, found) == ["b.parquet"]
    (log / f"{0:020}.json").unlink()
    with pytest.raises(DataError, match=r"log has not all commits from 0 to 1.*; write its rows to a folder"):
        current(tmp_path, found)
    (log / f"{10**19:020}.json").touch()
    with pytest.raises(DataError, match="has not all commits"):
        current(tmp_path, found)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (add("a.parquet", deletionVector={"storageType": "u"}), "rows deleted inside its files"),
        (add("s3://bucket/a.parquet"), r"files elsewhere \(s3://bucket/a.parquet\)"),
        (add("/etc/passwd"), "files elsewhere"),
        (add("../a.parquet"), "files elsewhere"),
        (add("gone.parquet"), r"without gone.parquet, which its log names: the copy is not complete"),
    ],
)
def test_a_delta_table_whose_rows_are_not_whole_files_is_refused(
    tmp_path: Path, action: Action, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        current(tmp_path, table(tmp_path, [action]))


@pytest.mark.parametrize("line", ["[1]", "{", "[" * 100_000, "\udcff"])
def test_a_log_that_cannot_be_read_is_an_error_naming_its_line(tmp_path: Path, line: str) -> None:
    found = table(tmp_path, [add("a.parquet")])
    (tmp_path / "_delta_log" / f"{1:020}.json").write_bytes(b"\n" + line.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"1\.json: line 2 is no action of a Delta table's log"):
        current(tmp_path, found)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (".hoodie/hoodie.properties", "a Hudi table"),
        ("metadata/v3.metadata.json", "an Iceberg table"),
        ("metadata/00002-9c12d441-03fe-4693-9a96-a0705ddf69c1.metadata.json", "an Iceberg table"),
    ],
)
def test_other_tables_with_a_history_are_refused_by_name(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / "lake" / file).parent.mkdir(parents=True)
    (tmp_path / "lake" / file).touch()
    with pytest.raises(DataError, match=f"lake: {kind}"):
        current(tmp_path, [])


def test_folders_of_other_names_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "rows.json").touch()
    assert current(tmp_path, [tmp_path / "metadata" / "rows.json"]) == ["rows.json"]
