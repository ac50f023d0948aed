"""The output folder: which files mark a job as done, and whose adapter may be replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.tuning import identity, output
from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import Output, TuningJob

Maker = Callable[..., TuningJob]


def finish(job: TuningJob, *names: str) -> OutputPaths:
    """Write an adapter of `job` with further files `names`."""
    with output.replacing(job, identity.requested(job)) as folder:
        for name in ("adapter_model.safetensors", "adapter_config.json", *names):
            (folder / name).write_text(f"{name} of {job.lora.r}")
    return OutputPaths(job.output.folder)


def test_finished_job_is_done_and_any_other_is_not(make_job: Maker) -> None:
    job = make_job()
    assert not output.is_done(job)
    paths = finish(job)
    assert output.is_done(job)
    assert output.is_done(make_job(training={"logging_steps": 5}))
    assert not output.is_done(make_job(training={"seed": 7}))
    assert not paths.saving.exists()
    (paths.folder / "adapter_model.safetensors").unlink()
    assert not output.is_done(job)


def test_node_without_an_adapter_is_done_once_the_job_is_finished(make_job: Maker) -> None:
    job = make_job()
    OutputPaths(job.output.folder).work.mkdir(parents=True)
    output.mark_finished(job, identity.requested(job))
    assert output.is_done(job, with_adapter=False)
    assert not output.is_done(job)


def test_finished_adapter_of_another_job_is_refused_with_what_differs(make_job: Maker) -> None:
    finish(make_job())
    output.check_replaceable(make_job())
    with pytest.raises(
        ConfigError,
        match=r"the finished adapter of another job \(learning_rate 0.01, now 0.5\); .* --overwrite",
    ):
        output.check_replaceable(make_job(training={"learning_rate": 0.5}))


def test_adapter_of_unknown_origin_is_refused(make_job: Maker) -> None:
    job = make_job()
    paths = OutputPaths(job.output.folder)
    paths.folder.mkdir(parents=True)
    output.check_replaceable(job)
    (paths.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter, and which job made it is not recorded"):
        output.check_replaceable(job)


def test_overwrite_replaces_the_adapter_when_the_new_one_is_complete(make_job: Maker, tmp_path: Path) -> None:
    paths = finish(make_job(), "tokenizer.model")
    (paths.folder / "notes.txt").write_text("mine")
    sentinel = paths.sentinel.read_text()
    other = make_job(training={"seed": 7}, output=Output(folder=tmp_path / "out", overwrite=True))
    output.check_replaceable(other)
    with (
        pytest.raises(OSError, match="full"),
        output.replacing(other, identity.requested(other)) as folder,
    ):
        (folder / "adapter_model.safetensors").write_text("half")
        raise OSError("full")
    assert output.is_done(make_job())
    assert paths.sentinel.read_text() == sentinel
    finish(other)
    assert output.is_done(other)
    assert not (paths.folder / "tokenizer.model").exists()  # the other base model's
    assert (paths.folder / "notes.txt").read_text() == "mine"


def test_adapter_that_a_kill_left_half_moved_may_be_replaced(make_job: Maker) -> None:
    job = make_job()
    paths = finish(job)
    paths.saving.write_text(paths.finished.read_text())
    paths.finished.unlink()
    paths.sentinel.unlink()
    output.check_replaceable(job)
    assert not output.is_done(job)


def test_the_working_folder_is_its_owners_alone_and_forgets_credentials(make_job: Maker) -> None:
    job = make_job()
    url = "https://user:SECRET@store.example/rows.parquet?sig=SECRET#sha256=" + "0" * 64
    job = job.model_copy(update={"data": job.data.model_copy(update={"urls": (url,)})})
    paths = OutputPaths(job.output.folder)
    paths.work.mkdir(parents=True, mode=0o755)
    assert paths.make_work().stat().st_mode & 0o777 == 0o700
    output.write_job(paths.job, job)
    assert paths.job.stat().st_mode & 0o777 == 0o600
    assert "SECRET" in paths.job.read_text(), "the workers fetch with it"
    output.forget(paths.job, job)
    left = TuningJob.model_validate_json(paths.job.read_text())
    assert left.data.urls == ("https://store.example/rows.parquet#sha256=" + "0" * 64,)
    assert not identity.requested(left).differences(identity.requested(job))
