"""The output folder: which files mark a job as done, and which settings decide its bytes."""

from collections.abc import Callable
from pathlib import Path

from runtime.tuning import output
from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import Output, TuningJob

Maker = Callable[..., TuningJob]


def test_finished_job_is_done_and_any_other_is_not(make_job: Maker) -> None:
    job = make_job()
    OutputPaths(job.output.folder).work.mkdir(parents=True)
    assert not output.is_done(job)
    output.mark_done(job)
    assert output.is_done(job)
    assert not output.is_done(make_job(training={"seed": 7}))


def test_node_without_an_adapter_is_done_once_the_job_is_finished(make_job: Maker) -> None:
    job = make_job()
    OutputPaths(job.output.folder).work.mkdir(parents=True)
    output.mark_finished(job)
    assert output.is_done(job, with_adapter=False)
    assert not output.is_done(job)


def test_settings_that_do_not_change_the_adapter_do_not_change_the_fingerprint(
    make_job: Maker, tmp_path: Path
) -> None:
    job = make_job()
    same = make_job(
        output=Output(folder=tmp_path / "other"), name="other", metrics_port=5001, metrics_host="::1"
    )
    assert output.fingerprint(same) == output.fingerprint(job)
    assert output.fingerprint(job, "digest of the data") != output.fingerprint(job)
    assert output.fingerprint(make_job(training={"learning_rate": 1e-3})) != output.fingerprint(job)
