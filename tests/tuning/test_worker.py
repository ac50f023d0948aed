"""One rank: how it reads the job that its parent process has resolved."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.tuning import worker
from runtime.tuning.settings import TuningJob


def test_resolved_job_is_read_back_with_the_token_of_the_environment(
    make_job: Callable[..., TuningJob], tmp_path: Path
) -> None:
    job = make_job()
    path = tmp_path / "job.json"
    path.write_text(job.model_dump_json())
    assert worker.read_resolved(path, {}) == job
    token = worker.read_resolved(path, {"HF_TOKEN": "hf_secret"}).hub_token
    assert token is not None
    assert token.get_secret_value() == "hf_secret"


def test_damaged_job_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{\n"name": ')
    with pytest.raises(ConfigError, match=r"job.json: not valid JSON: .* \(line 2\)"):
        worker.read_resolved(path, {})
