"""The parent process: what it refuses, how signals end it, and the reason it reports for its workers."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from runtime.errors import CapacityError, ConfigError, DivergedError, Failure, StoppedError, TransientError
from runtime.tuning import identity, launcher, output
from runtime.tuning.output import SENTINEL, OutputPaths
from runtime.tuning.settings import DataSource, Output, TuningJob
from runtime.tuning.train.checkpoints import fault, listed
from tests.faults.dataset_server import DatasetServer, Reply
from tests.tuning.conftest import free_port, write_rows

Maker = Callable[..., TuningJob]

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_fault_11_unwritable_output_fails_before_data_is_fetched(make_job: Maker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unreachable = DataSource(urls=("http://127.0.0.1:9/rows.parquet",), folder=tmp_path / "data")
    job = make_job(output=Output(folder=tmp_path / "file" / "out"), data=unreachable)
    with pytest.raises(ConfigError, match=r"output folder .* cannot be written"):
        launcher.run(job)


def test_a_job_without_a_temporary_directory_is_refused_before_data_is_fetched(
    make_job: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    unreachable = DataSource(urls=("http://127.0.0.1:9/rows.parquet",), folder=tmp_path / "data")
    with pytest.raises(ConfigError, match=r"no temporary directory .* mount one at /tmp or set TMPDIR"):
        launcher.run(make_job(data=unreachable))


def test_adapter_of_another_job_is_refused_before_data_is_fetched(make_job: Maker, tmp_path: Path) -> None:
    earlier = make_job()
    with output.replacing(earlier, identity.requested(earlier)) as folder:
        (folder / "adapter_model.safetensors").write_text("weights")
    unreachable = DataSource(urls=("http://127.0.0.1:9/rows.parquet",), folder=tmp_path / "data")
    other = make_job(data=unreachable, training={"seed": 7})
    with pytest.raises(ConfigError, match=r"finished adapter of another job \(seed 42, now 7; the data's"):
        launcher.run(other, processes=1)
    allowed = other.output.model_copy(update={"overwrite": True})
    with pytest.raises(TransientError):  # goes on to fetch
        launcher.run(other.model_copy(update={"output": allowed}), processes=1)
    assert output.is_done(earlier)


def test_small_disk_is_refused(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(CapacityError, match="MiB free, expected"):
        launcher.run(make_job())


def test_logger_that_is_not_installed_ends_the_job_before_data_is_fetched(make_job: Maker) -> None:
    job = make_job(training={"report_to": ["tensorboard", "mlflow"]})
    with pytest.raises(ConfigError, match="report_to is 'mlflow', but the package mlflow is not installed"):
        launcher.run(job, processes=1)
    assert not OutputPaths(job.output.folder).job.exists()


@pytest.mark.slow
def test_health_is_served_before_there_are_workers(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    port, phases = free_port(), []
    fetching, looked = threading.Event(), threading.Event()

    def slow_fetch(*_: object, **__: object) -> None:
        fetching.set()
        assert looked.wait(60)
        raise ConfigError("enough")

    monkeypatch.setattr("runtime.tuning.data.download.fetch", slow_fetch)

    def look() -> None:
        assert fetching.wait(60)
        phases.append(httpx.get(f"http://127.0.0.1:{port}/health").json()["phase"])
        looked.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    with pytest.raises(ConfigError, match="enough"):
        launcher.run(make_job(metrics_port=port))
    watcher.join()
    assert phases == ["data"]


def tune(job_folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    """Start `runtime tune`; its log is beside the folder."""
    with job_folder.with_suffix(".log").open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "runtime", "tune", *words, "--output", str(job_folder)],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def assert_stop_during_download(
    folder: Path, model: Path, url: str, is_waiting: Callable[[Path], bool]
) -> None:
    """Send SIGTERM once the download of `url` waits; it must end at once, without a partial file."""
    data = folder.with_name("data")
    process = tune(folder, str(model), "--data", url, "--set", f"data.folder={data}")
    deadline = time.monotonic() + 90
    while not is_waiting(data):
        assert process.poll() is None, folder.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert time.monotonic() - began < 20  # 0.5; a download that waits would take 30 and more
    last = json.loads(folder.with_suffix(".log").read_text().splitlines()[-1])
    assert last["msg"] == "stopped by SIGTERM; run the same command again to resume"
    assert not (data / "a.parquet").exists()


def test_fault_5_stop_does_not_wait_for_a_silent_server(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/a.parquet"
        assert_stop_during_download(tmp_path / "out", tiny_llama_dir, url, Path.exists)


def test_fault_5_stop_does_not_wait_for_a_stalled_server(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(b"PAR1" + bytes(5000), silent_s=60)]}) as server:
        url = server.url("/a.parquet")
        assert_stop_during_download(
            tmp_path / "out", tiny_llama_dir, url, lambda data: (data / ".a.parquet.validator").exists()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "rows", "split"),
    [("rows from 1 file:", 20_000, "0.95"), ("evaluating: ", 4_000, "0.1")],
    ids=["encoding", "evaluation"],
)
def test_fault_5_stop_ends_encoding_and_evaluation_at_once(
    tmp_path: Path, tiny_llama_dir: Path, sign: str, rows: int, split: str
) -> None:
    write_rows(tmp_path / "data/rows.parquet", rows)
    folder = tmp_path / "out"
    held_out = ("--set", f"data.train_share={split}")
    process = tune(folder, str(tiny_llama_dir), "--data", str(tmp_path / "data"), *held_out)
    log = folder.with_suffix(".log")
    deadline = time.monotonic() + 300
    while sign not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()
    assert sign == "evaluating: " or time.monotonic() - began < 20  # 1; the rows take more than half a minute
    assert not OutputPaths(folder).history.exists()  # a step that comes after what was to be ended
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["msg"] == "stopped by SIGTERM; run the same command again to resume"
    assert {path.name for path in folder.iterdir()} == {".work"}


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    """Return the trainers among a process's descendants."""
    found = []
    for child in process.children(recursive=True):
        try:
            if child.cmdline()[1:4] == ["-u", "-m", "runtime.tuning"]:
                found.append(child)
        except psutil.Error:
            continue
    return found


def freeze_after(
    step: int, job: TuningJob, then: Callable[[psutil.Process], None], *, below: int | None = None
) -> threading.Thread:
    """In a thread: stop a process's (this one's) trainer at `step` as a hung disk would, and do `then`."""

    def watch() -> None:
        history = OutputPaths(job.output.folder).history
        while not (history.exists() and len(history.read_text().splitlines()) >= step):
            time.sleep(0.02)
        (worker,) = workers_below(psutil.Process(below))
        worker.suspend()
        then(worker)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2], ids=["fault_8_grace_runs_out", "fault_6_second_signal"])
def test_trainer_that_cannot_save_is_killed_and_its_last_checkpoint_stays(
    make_job: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    monkeypatch.setattr(launcher, "CHECKPOINT_GRACE_S", 3 if signals == 1 else 60)
    job = make_job(training={**EVERY_STEP, "max_steps": 4000})
    signalled: list[float] = []
    frozen: list[psutil.Process] = []

    def send_signals(worker: psutil.Process) -> None:
        frozen.append(worker)
        for _ in range(signals):
            signalled.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    thread = freeze_after(5, job, send_signals)
    with pytest.raises(StoppedError):
        launcher.run(job, processes=1, termination_log=tmp_path / "absent")
    took = time.monotonic() - signalled[-1]
    thread.join()
    assert took < 30  # 4 and 0.5; without grace or a second signal it would be a minute
    with contextlib.suppress(psutil.TimeoutExpired):
        frozen[0].wait(60)
    left = frozen[0].is_running()
    if left:
        frozen[0].kill()
    assert not left, "its parent is gone, so only its own pid finds it"
    complete = [path for path in listed(OutputPaths(job.output.folder).checkpoints) if fault(path) is None]
    assert complete


@pytest.mark.slow
def test_run_started_right_after_a_kill_waits_for_the_old_workers(
    make_job: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They got SIGTERM and write a checkpoint: two trainers in one folder would damage it."""
    job = make_job(training={**EVERY_STEP, "max_steps": 4000})
    (tmp_path / "job.json").write_text(job.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from runtime.tuning import launcher;"
        "from runtime.tuning.settings import TuningJob;"
        "launcher.run(TuningJob.model_validate_json(Path(sys.argv[1]).read_text()), processes=1)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "job.json")], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    old: list[psutil.Process] = []
    freeze_after(5, job, old.append, below=first.pid).join()
    first.kill()
    first.wait()
    monkeypatch.setattr(launcher, "CHECKPOINT_GRACE_S", -3)
    with pytest.raises(ConfigError, match=r"output folder .*/out is in use by another run"):
        launcher.run(job, processes=1, termination_log=tmp_path / "absent")
    monkeypatch.setattr(launcher, "CHECKPOINT_GRACE_S", 60)
    running: list[bool] = []
    monkeypatch.setattr(launcher, "_train", lambda *_: running.append(old[0].is_running()))
    old[0].resume()
    launcher.run(job, processes=1, termination_log=tmp_path / "absent")
    assert running == [False]


@pytest.mark.slow
def test_fault_7_parent_reports_a_rank_that_was_killed(make_job: Maker, tmp_path: Path) -> None:
    job = make_job(training={"max_steps": 4000})
    termination_log = tmp_path / "termination-log"
    termination_log.touch()

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
        launcher.run(job, processes=2, termination_log=termination_log)
    killer.join()
    line = json.loads(termination_log.read_text())
    assert line["code"] == 1
    assert line["message"] == str(caught.value)
    assert not (job.output.folder / SENTINEL).exists()


@pytest.mark.slow
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
    termination_log = tmp_path / "termination-log"
    termination_log.touch()
    with pytest.raises(DivergedError, match=r"at step \d+; lower learning_rate"):
        launcher.run(job, processes=1, termination_log=termination_log)
    assert json.loads(termination_log.read_text())["code"] == 4
    assert [path.name for path in listed(OutputPaths(job.output.folder).checkpoints)]
    assert not (job.output.folder / SENTINEL).exists()
    assert not list((tmp_path / "layout").glob("blobs/*/*"))


CANARIES = {
    "HF_TOKEN": "hf_CANARYaaaaaaaaaaaa",
    "SAS": "CANARYsignature",
}


@pytest.mark.slow
def test_faults_56_57_58_offline_run_logs_json_and_holds_no_secret(
    tmp_path: Path, tiny_llama_dir: Path, rows_dir: Path
) -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip")
    out = tmp_path / "out"
    words = ["tune", str(tiny_llama_dir), "--data", str(rows_dir), "--output", str(out)]
    words += ["--set", "training.max_steps=4", "--set", "lora.r=4"]
    script = 'ip link set lo up && exec "$@"'  # torchrun needs the loopback; there is no other network
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, "-m", "runtime", *words],
        check=False,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "HF_TOKEN": CANARIES["HF_TOKEN"], "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    if b"Operation not permitted" in done.stderr:
        pytest.skip("a network namespace needs root")
    output = done.stderr.decode("utf-8") + done.stdout.decode("utf-8")
    assert done.returncode == 0, output
    assert "\r" not in output
    levels = [json.loads(line)["level"] for line in done.stderr.decode("utf-8").splitlines()]
    assert set(levels) == {"info"}, output
    assert (out / SENTINEL).exists()
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert b"CANARY" not in path.read_bytes(), path
    assert "CANARY" not in output
