"""Publishing again what is finished, and what a worker started by hand refuses before it begins."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from runtime.tuning import output
from runtime.tuning.settings import TuningJob

SEED = Path(__file__).parents[2] / "examples/fine-tuning/kaito_workspace_tuning_phi_3.yaml"


RANK = """
import os
import sys
from pathlib import Path
from runtime.tuning import job, publish
from runtime.tuning.train.progress import JobProgress
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.tuning.process.signals import StopSignal
made, out = Path(sys.argv[1]), Path(sys.argv[2])
ranks = Ranks.read(os.environ)
publish.publish = lambda *_: (out / f"published-{ranks.rank}").touch()
made = TuningJob.model_validate_json(made.read_text())
job.run(made, ranks=ranks, stop=StopSignal(), progress=JobProgress())
(out / f"ended-{ranks.rank}").touch()
ranks.destroy_process_group()
"""


def test_a_finished_job_is_published_again_by_the_first_rank_alone(
    make_job: Callable[..., TuningJob], tmp_path: Path
) -> None:
    job = make_job()
    output.mark_done(job)
    script, made, out = tmp_path / "rank.py", tmp_path / "job.json", tmp_path / "said"
    script.write_text(RANK)
    made.write_text(job.model_dump_json())
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, made, out], check=True, timeout=120, capture_output=True)
    assert sorted(path.name for path in out.iterdir()) == ["ended-0", "ended-1", "published-0"]


def test_a_worker_started_by_hand_refuses_a_manifest_with_placeholders() -> None:
    command = [sys.executable, "-m", "runtime.tuning", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "ACR_REPO_HERE" in done.stderr
