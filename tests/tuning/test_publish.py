"""Publishing again what is finished, and what a worker started by hand refuses before it begins."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.tuning import job as jobs
from runtime.tuning import places, publish
from runtime.tuning.bench import Course
from runtime.tuning.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.tuning.stop import StopSignal

SEED = Path(__file__).parents[2] / "examples/fine-tuning/kaito_workspace_tuning_phi_3.yaml"


def test_a_finished_job_is_published_again_by_the_first_rank_alone(
    make_job: Callable[..., TuningJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    places.mark_done(job)
    published: list[int] = []
    for rank in (0, 1):
        monkeypatch.setattr(publish, "publish", lambda *_, rank=rank: published.append(rank))
        jobs.run(job, ranks=Ranks(rank=rank, local_rank=rank, world=2), stop=StopSignal(), course=Course())
    assert published == [0]


def test_a_worker_started_by_hand_refuses_a_manifest_with_placeholders() -> None:
    command = [sys.executable, "-m", "runtime.tuning", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "ACR_REPO_HERE" in done.stderr
