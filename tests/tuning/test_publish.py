"""A finished job is published again, and not trained again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from runtime.tuning import output
from runtime.tuning.settings import TuningJob

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


def test_finished_job_is_published_again_by_rank_0_alone(
    make_job: Callable[..., TuningJob], tmp_path: Path
) -> None:
    job = make_job()
    output.mark_done(job)
    script, resolved, out = tmp_path / "rank.py", tmp_path / "job.json", tmp_path / "ended"
    script.write_text(RANK)
    resolved.write_text(job.model_dump_json())
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, resolved, out], check=True, timeout=120, capture_output=True)
    assert sorted(path.name for path in out.iterdir()) == ["ended-0", "ended-1", "published-0"]
