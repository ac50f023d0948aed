"""How a process of a pod ends: exit status and termination message."""

import json
from pathlib import Path

import pytest

from runtime.errors import ConfigError, StoppedError
from runtime.pod.termination import exit_status_of


def test_failure_becomes_its_exit_status_and_one_json_line(tmp_path: Path) -> None:
    place = tmp_path / "termination-log"
    place.touch()

    def work() -> None:
        raise ConfigError("port 80 is in use")

    assert exit_status_of(work, phase="serve", termination_log=place) == 2
    assert json.loads(place.read_text()) == {
        "phase": "serve", "code": 2, "message": "port 80 is in use", "step": 0, "retriable": False,
    }  # fmt: skip


def test_message_that_the_job_itself_wrote_stays(tmp_path: Path) -> None:
    place = tmp_path / "termination-log"
    place.touch()

    def work() -> None:
        place.write_text("stopped at step 42")
        raise StoppedError("stopped")

    assert exit_status_of(work, phase="start", termination_log=place) == 143
    assert place.read_text() == "stopped at step 42"


def test_outside_a_pod_nothing_is_written(tmp_path: Path) -> None:
    def work() -> None:
        raise ConfigError("x")

    assert exit_status_of(work, phase="start", termination_log=tmp_path / "none") == 2
    assert not list(tmp_path.iterdir())


def test_success_is_0_and_an_unexpected_error_keeps_its_traceback(tmp_path: Path) -> None:
    assert exit_status_of(lambda: None, phase="start", termination_log=tmp_path / "none") == 0
    with pytest.raises(ZeroDivisionError):
        exit_status_of(lambda: 1 / 0 and None, phase="start", termination_log=tmp_path / "none")
