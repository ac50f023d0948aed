"""Whole jobs in real processes: results, published image, experiment loggers, several ranks."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from runtime import adapters, oci
from runtime.provenance.facts import Facts
from runtime.tuning import launcher
from runtime.tuning.output import SENTINEL, OutputPaths
from runtime.tuning.settings import DataSource, Lora, Output, TuningJob
from runtime.tuning.train.checkpoints import listed
from runtime.tuning.train.progress import MetricsHistory
from runtime.weights_digest import of_folder
from tests.tuning.conftest import Worker, tiny_job, write_rows

pytestmark = pytest.mark.slow

Maker = Callable[..., TuningJob]

NO_DROPOUT = Lora(r=4, alpha=8)
"""Dropout draws differ between one and two processes."""


@dataclass(frozen=True)
class FinishedJob:
    """A job of 12 steps that has run to its end."""

    job: TuningJob
    image: str
    statuses: list[dict[str, Any]]
    """What Kubeflow's status endpoint received."""

    @property
    def folder(self) -> Path:
        return self.job.output.folder

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "tuning_report.json").read_text())
        return report

    def history(self) -> list[dict[str, Any]]:
        return MetricsHistory(OutputPaths(self.folder).history).entries()


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, rows_dir: Path
) -> Iterator[FinishedJob]:
    root = tmp_path_factory.mktemp("finished")
    token = root / "token"
    token.write_text("a-service-account")
    image = f"oci:{root}/layout:1"
    training = {"max_steps": 12, "report_to": ["tensorboard"]}
    output = Output(folder=root / "out", image=image)
    job = tiny_job(tiny_llama_dir, rows_dir, root / "out", training=training, output=output, lora=NO_DROPOUT)
    with pytest.MonkeyPatch.context() as environment, StatusEndpoint() as kubeflow:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("KUBEFLOW_TRAINER_SERVER_URL", kubeflow.url)
        environment.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
        launcher.run(job, processes=1, termination_log=root / "absent")
    yield FinishedJob(job, image, kubeflow.statuses)


class StatusEndpoint(http.server.ThreadingHTTPServer):
    """Kubeflow's status endpoint."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _StatusHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/status"

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _StatusHandler(http.server.BaseHTTPRequestHandler):
    server: StatusEndpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == "Bearer a-service-account"
        self.server.statuses.append(body["trainerStatus"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_job_leaves_adapter_report_and_sentinel(finished: FinishedJob) -> None:
    folder, report, result = finished.folder, finished.report, finished.report["result"]
    assert adapters.check(folder).rank == 4
    assert (folder / SENTINEL).read_text().startswith("Fine-Tuning completed at ")
    assert result["held_out_loss"]["after"] < result["held_out_loss"]["before"] - 0.1
    assert len(result["samples"]) == 5
    assert report["data"]["train_rows"] == 59
    assert [step for step, _ in result["curve"]["held_out"]] == [0, 7, 12]
    assert result["planned_memory_bytes"] > 0
    page = (folder / "report.html").read_text()
    assert f"{result['held_out_loss']['after']:,.3f}" in page
    assert report["adapter_sha256"] in page
    assert report["model"]["weights_sha256"] == of_folder(finished.job.model.path)
    assert report["packages"]["torch"] == report["versions"]["torch"]
    stated = Facts.read(folder)
    assert stated.base is not None
    assert stated.base.weights_sha256 == report["model"]["weights_sha256"]
    assert [(file.name, file.sha256) for file in stated.data] == [
        (file["name"], file["sha256"]) for file in report["data"]["files"]
    ]
    assert (stated.job, stated.settings["lora"]["r"]) == (finished.job.name, 4)
    assert stated.scores["heldOutLossAfter"] == result["held_out_loss"]["after"]
    assert (stated.scores["steps"], stated.scores["verdict"]) == (12, report["verdict"]["kind"])
    assert stated.packages.keys() == report["packages"].keys()
    assert (stated.machine, stated.versions) == (report["machine"], report["versions"])
    assert sorted({entry["step"] for entry in finished.history()}) == list(range(1, 13))
    assert not listed(OutputPaths(folder).checkpoints)


def test_fault_9_rerun_trains_nothing_and_pushes_nothing_new(
    finished: FinishedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, folder = oci.parse(finished.image), finished.folder
    digest = oci.inspect(image).digest
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    started: list[object] = []
    monkeypatch.setattr(launcher, "_train", lambda *arguments: started.append(arguments))
    launcher.run(finished.job, processes=1)
    assert not started
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == before
    assert oci.inspect(image).digest == digest
    pulled = oci.pull(image, tmp_path / "pulled")
    names = {path.name for path in pulled.rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html"} <= names


def test_tensorboard_and_kubeflow_receive_every_step(finished: FinishedJob) -> None:
    from tensorboardX.proto.event_pb2 import Event

    (written,) = (finished.folder / "runs").glob("events.*")
    values = [value for event in _records(written.read_bytes(), Event) for value in event.summary.value]
    assert sum(value.tag == "train/loss" for value in values) == 12
    percents = [status["progressPercentage"] for status in finished.statuses]
    assert (percents[0], percents[-1]) == (0, 100)
    assert {metric["name"] for metric in finished.statuses[-1]["metrics"]} >= {"loss", "learning_rate"}


def _records(written: bytes, kind: Callable[[], Any]) -> Iterator[Any]:
    """Yield the messages of a TFRecord file: length (8 bytes), its checksum (4), message, checksum (4)."""
    while written:
        size = int.from_bytes(written[:8], "little")
        message = kind()
        message.ParseFromString(written[12 : 12 + size])
        yield message
        written = written[16 + size :]


def test_adapter_loads_in_plain_peft(finished: FinishedJob, tiny_llama_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    loaded = PeftModel.from_pretrained(base, str(finished.folder))
    moved = [p for name, p in loaded.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert len(moved) == 14


def test_two_processes_give_the_loss_curve_of_one_and_warn_once(
    make_job: Maker, finished: FinishedJob, tmp_path: Path
) -> None:
    """Those of FSDP give DDP's to the bit: tests/tuning/model/test_fsdp.py."""
    half = {"max_steps": 12, "per_device_train_batch_size": 2}
    (tmp_path / "part").mkdir()
    write_rows(tmp_path / "part" / "rows-00000-of-00002.parquet")
    data = DataSource(folder=tmp_path / "part")
    job = make_job("two", training=half, parallel="ddp", lora=NO_DROPOUT, data=data)
    worker = Worker(job, processes=2)
    assert worker.wait() == 0, worker.output()
    assert worker.output().count("only 1 of its 2 parts are there") == 1
    one, two = (
        list({step["step"]: step["loss"] for step in steps}.values())
        for steps in (finished.history(), worker.steps())
    )
    assert len(one) == 12
    assert two == pytest.approx(one, abs=1e-4)
    result = json.loads(worker.paths.report.read_text())["result"]
    expected = finished.report["result"]["held_out_loss"]["after"]
    assert result["held_out_loss"]["after"] == pytest.approx(expected, abs=1e-4)
