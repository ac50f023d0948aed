"""Experiment loggers: unknown names, missing packages, and where they write."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.tuning import loggers


def test_unknown_name_is_an_error_with_the_nearest_one() -> None:
    loggers.known(["all", "none", "tensorboard"], "job.yaml")
    with pytest.raises(ConfigError, match=r"job.yaml: 'report_to' holds 'wandbb' \(did you mean 'wandb'"):
        loggers.known(["wandbb"], "job.yaml")


def test_missing_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    loggers.check({"report_to": ["none", "kubeflow"]})
    with pytest.raises(ConfigError, match="the package tensorboardX is not installed; pip install"):
        loggers.check({"report_to": ["tensorboard"]})


def test_loggers_on_disk_write_beside_the_adapter(tmp_path: Path) -> None:
    assert all(str(tmp_path) in value for value in loggers.environment(tmp_path).values())
