"""A finished job is published again, and not trained again."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import oci
from runtime.cli import main
from runtime.errors import ConfigError
from runtime.oci.access import DEFAULT
from runtime.provenance import attached
from runtime.tuning import identity, launcher, output, publish
from runtime.tuning.settings import TuningJob
from tests.oci.keypairs import make_pair

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
    with output.replacing(job, identity.requested(job)) as folder:
        (folder / "adapter_model.safetensors").touch()
    script, resolved, out = tmp_path / "rank.py", tmp_path / "job.json", tmp_path / "ended"
    script.write_text(RANK)
    resolved.write_text(job.model_dump_json())
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, resolved, out], check=True, timeout=120, capture_output=True)
    assert sorted(path.name for path in out.iterdir()) == ["ended-0", "ended-1", "published-0"]


def test_tune_and_push_make_the_same_image_of_a_job_and_no_secret_is_in_it(
    make_job: Callable[..., TuningJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://store.example/rows.jsonl?sig=s3cr3t-signature"
    job = make_job()
    image = job.output.model_copy(update={"image": f"oci:{tmp_path}/tuned:v1"})
    job = job.model_copy(update={"output": image, "data": job.data.model_copy(update={"urls": (url,)})})
    paths = output.OutputPaths(job.output.folder)
    paths.checkpoints.mkdir(parents=True)
    (paths.checkpoints / "optimizer.pt").write_text("state")
    paths.job.write_text(job.model_dump_json())
    model = {"name": job.model.name, "repository": job.model.repository, "revision": job.model.revision}
    with output.replacing(job, identity.requested(job)) as folder:
        report = {"job": job.name, "model": model, "data": {"files": []}}
        output.OutputPaths(folder).report.write_text(json.dumps(report))
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(random.Random(1).randbytes(100_000))
    digest = publish.publish(job, DEFAULT)
    assert main.run(["push", str(paths.folder), f"oci:{tmp_path}/pushed:v1"], {}) == 0
    assert capsys.readouterr().out.strip() == digest
    blobs = [path.read_bytes() for path in (tmp_path / "tuned").rglob("*") if path.is_file()]
    blobs += [gzip.decompress(blob) for blob in blobs if blob.startswith(b"\x1f\x8b")]
    assert any(b"adapter_config.json" in blob for blob in blobs)
    assert not any(b"s3cr3t" in blob or b"job.json" in blob or b"optimizer" in blob for blob in blobs)
    pulled = oci.pull(oci.parse(f"oci:{tmp_path}/pushed:v1"), tmp_path / "pulled")
    assert main.run(["push", str(pulled), f"oci:{tmp_path}/again:v1"], {}) == 0
    assert capsys.readouterr().out.strip() == digest


def test_job_signs_its_image_and_states_where_it_comes_from(
    make_job: Callable[..., TuningJob], tmp_path: Path
) -> None:
    pair, image = make_pair(tmp_path, password="pass", form="SIGSTORE"), f"oci:{tmp_path}/tuned:v1"
    job = make_job()
    signed = job.output.model_copy(update={"image": image, "sign_key": pair.private})
    job = job.model_copy(update={"output": signed})
    with output.replacing(job, identity.requested(job)) as folder:
        report = {"job": job.name, "model": {"weights_sha256": "b" * 64}, "settings": {"method": "lora"}}
        output.OutputPaths(folder).report.write_text(json.dumps(report))
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="COSIGN_PASSWORD"):
        publish.publish(job, publish.access_of(job, {}))
    digest = publish.publish(job, publish.access_of(job, {"COSIGN_PASSWORD": "pass"}))
    assert digest is not None
    reference, keys = oci.parse(image), oci.read_keys([str(pair.public)])
    oci.verify(reference, digest, [str(pair.public)])
    (stated,) = attached(reference, oci.inspect(reference), keys, access=DEFAULT).statements
    assert stated.state == f"signed by {pair.public}"
    assert stated.facts["build type"] == "urn:workspace-runtime:tune:v1"


def test_checkpoints_that_could_not_be_pulled_again_are_refused_first(
    make_job: Callable[..., TuningJob], tmp_path: Path
) -> None:
    pair, job = make_pair(tmp_path), make_job()
    places = job.output.model_copy(update={"checkpoint_image": f"oci:{tmp_path}/layout:c"})
    required = job.model.model_copy(update={"required_keys": (str(pair.public),)})
    job = job.model_copy(update={"output": places, "model": required})
    with pytest.raises(ConfigError, match="has no key to sign its checkpoints with; name one with --sign"):
        launcher.run(job, access=publish.access_of(job, {}), processes=1)
