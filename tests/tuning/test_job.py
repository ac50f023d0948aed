"""Whole jobs in real processes: results, resume, signals, divergence, several ranks."""

import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from runtime import adapters, oci
from runtime.errors import CapacityError, ConfigError, DivergedError, Failure
from runtime.tuning import launcher
from runtime.tuning.output import SENTINEL, OutputPaths
from runtime.tuning.settings import DataSource, Lora, Output, TuningJob
from runtime.tuning.train.checkpoints import MANIFEST, listed
from runtime.tuning.train.progress import MetricsHistory
from tests.tuning.conftest import Worker

pytestmark = pytest.mark.slow

Maker = Callable[..., TuningJob]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield


def test_job_leaves_adapter_report_and_sentinel_and_is_pushed(make_job: Maker, tmp_path: Path) -> None:
    image = f"oci:{tmp_path}/layout:1"
    job = make_job(output=Output(folder=tmp_path / "out", image=image), training={"max_steps": 12})
    launcher.run(job, processes=1, termination_log=tmp_path / "absent")
    folder = job.output.folder
    assert adapters.check(folder).rank == 4
    assert (folder / SENTINEL).read_text().startswith("Fine-Tuning completed at ")
    report = json.loads((folder / "tuning_report.json").read_text())
    result = report["result"]
    assert result["held_out_loss"]["after"] < result["held_out_loss"]["before"] - 0.1
    assert len(result["samples"]) == 5
    assert report["data"]["train_rows"] == 59
    assert [step for step, _ in result["curve"]["held_out"]] == [0, 7, 12]
    assert result["planned_memory_bytes"] > 0
    page = (folder / "report.html").read_text()
    assert f"{result['held_out_loss']['after']:,.3f}" in page
    assert report["adapter_sha256"] in page
    steps = [entry["step"] for entry in MetricsHistory(OutputPaths(folder).history).entries()]
    assert sorted(set(steps)) == list(range(1, 13))
    assert not listed(OutputPaths(folder).checkpoints)
    # fault 9: a rerun trains nothing and pushes nothing new
    digest = oci.inspect(oci.parse(image)).digest
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    began = time.monotonic()
    launcher.run(job, processes=1)
    assert time.monotonic() - began < 3
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == before
    assert oci.inspect(oci.parse(image)).digest == digest
    pulled = oci.pull(oci.parse(image), tmp_path / "pulled")
    inside = {path.name for path in pulled.rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html"} <= inside


def test_tensorboard_and_kubeflow_hear_of_every_step(
    make_job: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX.proto.event_pb2 import Event

    token = tmp_path / "token"
    token.write_text("a-service-account")
    with Heard() as kubeflow:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", kubeflow.url)
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
        job = make_job(training={"max_steps": 6, "report_to": ["tensorboard"]})
        launcher.run(job, processes=1, termination_log=tmp_path / "absent")
    (written,) = (job.output.folder / "runs").glob("events.*")
    values = [value for event in _records(written.read_bytes(), Event) for value in event.summary.value]
    assert sum(value.tag == "train/loss" for value in values) == 6
    percents = [status["progressPercentage"] for status in kubeflow.statuses]
    assert (percents[0], percents[-1]) == (0, 100)
    assert {metric["name"] for metric in kubeflow.statuses[-1]["metrics"]} >= {"loss", "learning_rate"}


def _records(written: bytes, kind: Callable[[], Any]) -> Iterator[Any]:
    """Yield the messages of a TFRecord file: length (8 bytes), its checksum (4), message, checksum (4)."""
    while written:
        size = int.from_bytes(written[:8], "little")
        message = kind()
        message.ParseFromString(written[12 : 12 + size])
        yield message
        written = written[16 + size :]


class Heard(http.server.ThreadingHTTPServer):
    """Kubeflow's status endpoint."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Listening)
        self.url = f"http://127.0.0.1:{self.server_port}/status"

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Listening(http.server.BaseHTTPRequestHandler):
    server: Heard

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == "Bearer a-service-account"
        self.server.statuses.append(body["trainerStatus"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_logger_that_is_not_installed_ends_the_job_before_data_is_fetched(make_job: Maker) -> None:
    job = make_job(training={"report_to": ["tensorboard", "mlflow"]})
    with pytest.raises(ConfigError, match="report_to is 'mlflow', but the package mlflow is not installed"):
        launcher.run(job, processes=1)
    assert not OutputPaths(job.output.folder).job.exists()


def test_adapter_loads_in_plain_peft_and_names_no_local_path_for_a_public_base(
    make_job: Maker, tiny_llama_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = make_job(training={"max_steps": 4}, method="lora", quantization=None)
    assert Worker(job).wait() == 0
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    loaded = PeftModel.from_pretrained(base, str(job.output.folder))
    moved = [p for name, p in loaded.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert len(moved) == 14


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_loss_curve_of_one(make_job: Maker, parallel: str) -> None:
    shape = {"lora": Lora(r=4, alpha=8)}  # dropout draws differ between one and two processes
    alone = Worker(make_job("one", training={"max_steps": 12}, **shape))
    assert alone.wait() == 0, alone.said()
    half = {"max_steps": 12, "per_device_train_batch_size": 2}
    both = Worker(make_job("two", training=half, parallel=parallel, **shape), processes=2)
    assert both.wait() == 0, both.said()
    one, two = (
        list({step["step"]: step["loss"] for step in worker.steps()}.values()) for worker in (alone, both)
    )
    assert len(one) == 12
    assert two == pytest.approx(one, abs=1e-4)
    reports = [json.loads(worker.places.report.read_text())["result"] for worker in (alone, both)]
    assert reports[1]["held_out_loss"]["after"] == pytest.approx(
        reports[0]["held_out_loss"]["after"], abs=1e-4
    )


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, bytes]:
    """The adapter bytes of the run that nothing disturbed, made by the first test that asks."""
    return {}


def undisturbed(job_of: Maker, kept: dict[str, bytes]) -> bytes:
    if "adapter" not in kept:
        worker = Worker(job_of("reference", training=OFTEN))
        assert worker.wait() == 0, worker.said()
        kept["adapter"] = worker.adapter()
    return kept["adapter"]


OFTEN = {"save_strategy": "steps", "save_steps": 4, "max_steps": 60}


def test_fault_1_and_3_kill_then_damaged_checkpoint_ends_with_the_same_bytes(
    make_job: Maker, uninterrupted: dict[str, bytes]
) -> None:
    expected = undisturbed(make_job, uninterrupted)
    job = make_job(training=OFTEN)
    first = Worker(job)
    first.wait_for_step(13)
    first.process.kill()
    first.wait()
    assert not (job.output.folder / SENTINEL).exists()
    assert not (job.output.folder / "adapter_model.safetensors").exists()
    second = Worker(job)
    second.wait_for_step(22)
    second.process.kill()
    second.wait()
    whole = [
        path for path in listed(OutputPaths(job.output.folder).checkpoints) if (path / MANIFEST).exists()
    ]
    damaged = whole[-1] / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    last = Worker(job)
    assert last.wait() == 0, last.said()
    assert f"skipping {whole[-1].name}: adapter_model.safetensors is damaged" in last.said()
    assert "resuming from checkpoint-" in last.said()
    assert last.adapter() == expected


def test_fault_4_sigterm_takes_a_checkpoint_exits_143_and_resumes_bit_exactly(
    make_job: Maker, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    expected = undisturbed(make_job, uninterrupted)
    job = make_job(
        training={"save_strategy": "no", "max_steps": 60},
        output=Output(folder=tmp_path / "out", image=f"oci:{tmp_path}/layout:1"),
    )
    worker = Worker(job)
    worker.wait_for_step(9)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait(25) == 143, worker.said()
    reason = worker.failure()
    assert (reason["code"], reason["phase"], reason["retriable"]) == (143, "train", True)
    assert reason["step"] >= 9
    assert not (job.output.folder / SENTINEL).exists()
    assert not (tmp_path / "layout").exists()
    rerun = Worker(job)
    assert rerun.wait() == 0, rerun.said()
    assert "resuming from checkpoint-" in rerun.said()
    assert rerun.adapter() == expected


def test_fault_7_parent_reports_a_rank_that_was_killed(make_job: Maker, tmp_path: Path) -> None:
    import threading

    job = make_job(training={"max_steps": 4000})
    told = tmp_path / "termination-log"
    told.touch()

    def kill_rank_1() -> None:
        history = OutputPaths(job.output.folder).history
        while not (history.exists() and len(history.read_text().splitlines()) > 3):
            time.sleep(0.05)
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                content = path.read_bytes()
                command = path.with_name("cmdline").read_bytes()
            except OSError:
                continue
            if b"\0RANK=1\0" in content and str(job.output.folder).encode() in command:
                os.kill(int(path.parent.name), signal.SIGKILL)

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(Failure) as caught:
        launcher.run(job, processes=2, termination_log=told)
    killer.join()
    line = json.loads(told.read_text())
    assert line["code"] == 1
    assert line["message"] == str(caught.value)
    assert not (job.output.folder / SENTINEL).exists()


def test_fault_25_diverged_run_ends_4_and_keeps_its_checkpoint(make_job: Maker, tmp_path: Path) -> None:
    job = make_job(
        training={
            "learning_rate": 1e30,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "save_strategy": "steps",
            "save_steps": 1,
        },
        output=Output(folder=tmp_path / "out", image=f"oci:{tmp_path}/layout:1"),
    )
    told = tmp_path / "termination-log"
    told.touch()
    with pytest.raises(DivergedError, match=r"at step \d+; lower learning_rate"):
        launcher.run(job, processes=1, termination_log=told)
    assert json.loads(told.read_text())["code"] == 4
    assert [path.name for path in listed(OutputPaths(job.output.folder).checkpoints)]
    assert not (job.output.folder / SENTINEL).exists()
    assert not list((tmp_path / "layout").glob("blobs/*/*"))


def test_fault_11_output_that_cannot_be_written_fails_before_data_is_asked_for(
    make_job: Maker, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    unreachable = DataSource(urls=("http://127.0.0.1:9/rows.parquet",), folder=tmp_path / "data")
    job = make_job(output=Output(folder=tmp_path / "file" / "out"), data=unreachable)
    with pytest.raises(ConfigError, match=r"output folder .* cannot be written"):
        launcher.run(job)


def test_checkpoints_come_by_the_clock_when_save_strategy_is_no(make_job: Maker) -> None:
    job = make_job(training={"save_strategy": "no", "max_steps": 40}, checkpoint_minutes=0.0005)
    worker = Worker(job)
    worker.wait_for_step(30)
    assert listed(OutputPaths(job.output.folder).checkpoints)
    worker.process.kill()
    worker.wait()


def test_checkpoints_of_another_job_are_not_gone_on_from(make_job: Maker) -> None:
    job = make_job(training=OFTEN)
    first = Worker(job)
    first.wait_for_step(9)
    first.process.kill()
    first.wait()
    other = Worker(make_job(training={**OFTEN, "max_steps": 8}))
    assert other.wait() == 0, other.said()
    assert "are another job's: starting from the beginning" in other.said()


def test_small_disk_is_refused(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(CapacityError, match="MiB free, expected"):
        launcher.run(make_job())
