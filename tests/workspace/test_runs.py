"""A run's name and folder, and which earlier run the same command continues."""

import json
import os
import re
from pathlib import Path

import pytest

from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import TuningJob
from runtime.workspace import Resolved, load_job, runs
from tests.workspace.documents import SEED

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tickets.v2.jsonl").write_text('{"text": "a"}\n')
    return "tickets.v2.jsonl"


def placed(rows: str, *, nodes: int = 1, **overrides: object) -> Resolved[TuningJob]:
    root = Path("empty root")
    job = load_job(MODEL, environ={}, overrides={"--data": [rows], **overrides}, root=root)
    return runs.place(job, nodes=nodes)


def leave(folder: Path, job: TuningJob, *, finished: bool, at: float = 1e9) -> None:
    """Leave behind what a run leaves in its folder."""
    paths = OutputPaths(folder)
    paths.work.mkdir(parents=True)
    paths.job.write_text(job.model_dump_json())
    os.utime(paths.job, (at, at))
    if finished:
        paths.sentinel.touch()


def test_a_run_is_called_after_its_data_and_the_time(rows: str) -> None:
    resolved = placed(rows)
    job = resolved.config
    assert re.fullmatch(r"tickets-\d{8}-\d{4}", job.run)
    assert (job.name, job.output.folder) == ("tickets", Path("results") / job.run)
    assert resolved.sources["output.folder"] == "default: the run's name"
    assert job.sources["run"] == resolved.sources["run"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("data/tickets.parquet", "tickets"),
        ("data/", "data"),
        ("https://store.example/a/my%20rows.jsonl.gz?sig=x", "my rows"),
        ("registry.example/team/rows:1", "rows"),
        ("oci:./layout:data", "layout"),
    ],
)
def test_data_has_a_name_wherever_it_lies(word: str, name: str) -> None:
    assert runs.data_name(word) == name


def test_a_workspace_keeps_its_name_and_a_given_folder_is_used(tmp_path: Path) -> None:
    resolved = runs.place(load_job(SEED, environ={}, overrides={"--output": ["out"]}, root=tmp_path))
    assert resolved.config.output.folder == Path("out")
    assert re.fullmatch(r"workspace-tuning-phi-3-\d{8}-\d{4}", resolved.config.run)


def test_nodes_whose_clocks_differ_have_one_folder(rows: str) -> None:
    assert placed(rows, nodes=2).config.output.folder == Path("results/tickets")


def test_the_newest_interrupted_run_of_the_same_job_is_continued(rows: str) -> None:
    job = placed(rows).config
    leave(Path("results/tickets-old"), job, finished=False, at=1e9)
    leave(Path("results/tickets-new"), job, finished=False, at=2e9)
    leave(Path("results/tickets-done"), job, finished=True, at=3e9)
    leave(Path("results/tickets-other"), placed(rows, **{"lora.r": 4}).config, finished=False, at=3e9)
    Path("results/broken/.work").mkdir(parents=True)
    Path("results/broken/.work/job.json").write_text(json.dumps({"name": 3}))
    continued = placed(rows)
    assert continued.config.output.folder == Path("results/tickets-new")
    assert continued.config.run == "tickets-new"
    assert "continued" in continued.sources["output.folder"]


def test_a_finished_run_is_not_taken_again_unless_its_image_may_be_missing(rows: str) -> None:
    leave(Path("results/tickets-done"), placed(rows).config, finished=True)
    assert placed(rows).config.run != "tickets-done"
    image = {"--output": ["oci:./registry:1"]}
    leave(Path("results/tickets-pushed"), placed(rows, **image).config, finished=True)
    assert placed(rows, **image).config.run == "tickets-pushed"


def test_jobs_that_begin_in_one_minute_have_folders_of_their_own(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20261130-1132")
    for name in ("tickets-20261130-1132", "tickets-20261130-1132-2", "tickets-20261130-1132-3"):
        job = placed(rows).config
        assert (job.run, job.output.folder) == (name, Path("results") / name)
        leave(job.output.folder, job, finished=True)


def test_a_name_that_the_user_gives_is_the_runs_and_its_folders(rows: str, tmp_path: Path) -> None:
    resolved = placed(rows, run="hello")
    assert (resolved.config.run, resolved.config.output.folder) == ("hello", Path("results/hello"))
    assert resolved.sources["run"] == "flag --set run"
    job = placed(rows, run="../my run", **{"--output": [str(tmp_path)]}).config
    assert (job.run, job.output.folder) == ("../my run", tmp_path)
    assert placed(rows, run="../my run").config.output.folder == Path("results/my-run")
