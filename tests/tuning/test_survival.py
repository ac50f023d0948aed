"""Ends that nobody planned: kills while files are written, full disks, silent servers, impatience."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.errors import ConfigError, StoppedError
from runtime.tuning import launcher
from runtime.tuning.output import SENTINEL, OutputPaths
from runtime.tuning.settings import Output, TuningJob
from runtime.tuning.train.checkpoints import MANIFEST, fault, listed, step_of
from tests.faults.dataset_server import DatasetServer, Reply
from tests.tuning.conftest import Worker, write_rows

Maker = Callable[..., TuningJob]

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 40}


def kill_when(worker: Worker, holds: Callable[[], bool]) -> None:
    """SIGKILL the worker at a moment when `holds()`: it is frozen first, so that the moment is the one."""
    process = psutil.Process(worker.process.pid)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert worker.process.poll() is None, worker.said()
        if holds():
            process.suspend()
            if holds():
                worker.process.kill()
                worker.wait()
                return
            process.resume()
    pytest.fail(f"the moment did not come: {worker.said()}")


def half_written(checkpoints: Path, name: str) -> bool:
    """Whether the newest checkpoint has file `name` and no manifest yet."""
    found = listed(checkpoints)
    return bool(found) and (found[-1] / name).exists() and not (found[-1] / MANIFEST).exists()


def newest_step(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint, whole or not; 0 where there is none."""
    return max(map(step_of, listed(checkpoints)), default=0)


@pytest.mark.slow
def test_fault_1_and_2_killed_wherever_it_is_the_job_ends_with_the_same_bytes(make_job: Maker) -> None:
    undisturbed = Worker(make_job("undisturbed", training=EVERY_STEP))
    assert undisturbed.wait() == 0, undisturbed.said()
    job = make_job(training=EVERY_STEP)
    here = OutputPaths(job.output.folder)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        before = newest_step(here.checkpoints)
        kill_when(
            Worker(job),
            lambda before=before, name=name: (  # type: ignore[misc]
                newest_step(here.checkpoints) > before + 1 and half_written(here.checkpoints, name)
            ),
        )
        assert fault(listed(here.checkpoints)[-1]) == "it was not finished"
    chance = random.Random(7)
    for _ in range(2):
        worker = Worker(job)
        worker.wait_for_step(newest_step(here.checkpoints) + 2)
        time.sleep(chance.random() * 0.2)
        worker.process.kill()
        worker.wait()
    kill_when(
        Worker(job),
        lambda: (here.folder / "adapter_model.safetensors").exists() and not here.sentinel.exists(),
    )
    last = Worker(job)
    assert last.wait() == 0, last.said()
    assert ": it was not finished" in last.said()
    assert last.said().count("resuming from checkpoint-") >= 5
    assert last.adapter() == undisturbed.adapter()
    assert here.sentinel.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_fault_10_disk_that_fills_up_ends_6_and_keeps_the_last_checkpoint(
    make_job: Maker, small_disk: Path
) -> None:
    job = make_job(training={**EVERY_STEP, "save_total_limit": 1000}, output=Output(folder=small_disk))
    worker = Worker(job)
    assert worker.wait() == 6, worker.said()
    reason = worker.failure()
    assert (reason["kind"], reason["phase"]) == ("CapacityError", "train")
    assert "no space left on the disk" in reason["message"]
    left = listed(OutputPaths(small_disk).checkpoints)
    assert left
    assert [fault(path) for path in left] == [None] * len(left)
    assert not (small_disk / SENTINEL).exists()


def tune(job_folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    """Start `runtime tune`; its log is beside the folder."""
    with job_folder.with_suffix(".log").open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "runtime", "tune", *words, "--output", str(job_folder)],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def stopped_while_it_waits(folder: Path, model: Path, url: str, waits: Callable[[Path], bool]) -> None:
    """Send SIGTERM once the download of `url` waits, and hold that it ends at once, without half a file."""
    data = folder.with_name("data")
    process = tune(folder, str(model), "--data", url, "--set", f"data.folder={data}")
    deadline = time.monotonic() + 90
    while not waits(data):
        assert process.poll() is None, folder.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(25) == 143
    assert time.monotonic() - began < 5
    last = json.loads(folder.with_suffix(".log").read_text().splitlines()[-1])
    assert last["msg"] == "stopped by SIGTERM; run the same command again to resume"
    assert not (data / "a.parquet").exists()


def test_fault_5_stop_does_not_wait_for_a_server_that_says_nothing(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/a.parquet"
        stopped_while_it_waits(tmp_path / "out", tiny_llama_dir, url, Path.exists)


def test_fault_5_stop_does_not_wait_for_a_server_that_stalls(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(b"PAR1" + bytes(5000), silent_s=60)]}) as server:
        url = server.url("/a.parquet")
        stopped_while_it_waits(
            tmp_path / "out", tiny_llama_dir, url, lambda data: (data / ".a.parquet.validator").exists()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "split"),
    [("rows from 1 files", "0.95"), ("evaluating: ", "0.1")],
    ids=["encoding", "evaluation"],
)
def test_fault_5_stop_ends_encoding_and_evaluation_at_once(
    tmp_path: Path, tiny_llama_dir: Path, sign: str, split: str
) -> None:
    write_rows(tmp_path / "data/rows.parquet", 20_000)
    folder = tmp_path / "out"
    held_out = ("--set", f"data.train_share={split}")
    process = tune(folder, str(tiny_llama_dir), "--data", str(tmp_path / "data"), *held_out)
    log = folder.with_suffix(".log")
    deadline = time.monotonic() + 120
    while sign not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(25) == 143, log.read_text()
    assert time.monotonic() - began < 10
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
def test_trainer_that_cannot_save_is_ended_and_its_last_checkpoint_stands(
    make_job: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    monkeypatch.setattr(launcher, "CHECKPOINT_GRACE_S", 3 if signals == 1 else 60)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = make_job(training={**EVERY_STEP, "max_steps": 4000})
    asked: list[float] = []
    frozen: list[psutil.Process] = []

    def ask(worker: psutil.Process) -> None:
        frozen.append(worker)
        for _ in range(signals):
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    thread = freeze_after(5, job, ask)
    with pytest.raises(StoppedError):
        launcher.run(job, processes=1, termination_log=tmp_path / "absent")
    took = time.monotonic() - asked[-1]
    thread.join()
    assert took < (10 if signals == 1 else 2)
    with contextlib.suppress(psutil.TimeoutExpired):
        frozen[0].wait(5)
    left = frozen[0].is_running()
    if left:
        frozen[0].kill()
    assert not left, "nobody is below this process any more, so only its own number finds it"
    whole = [path for path in listed(OutputPaths(job.output.folder).checkpoints) if fault(path) is None]
    assert whole


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
    script = 'ip link set lo up && exec "$@"'  # torchrun meets itself on the loopback; there is nothing else
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, "-m", "runtime", *words],
        check=False,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "HF_TOKEN": CANARIES["HF_TOKEN"], "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    if b"Operation not permitted" in done.stderr:
        pytest.skip("a network namespace needs root")
    said = done.stderr.decode("utf-8") + done.stdout.decode("utf-8")
    assert done.returncode == 0, said
    assert "\r" not in said
    levels = [json.loads(line)["level"] for line in said.splitlines()]
    assert set(levels) == {"info"}, said
    assert (out / SENTINEL).exists()
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert b"CANARY" not in path.read_bytes(), path
    assert "CANARY" not in said


@pytest.mark.slow
def test_a_run_started_right_after_a_kill_waits_for_the_old_workers(
    make_job: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have SIGTERM and write a checkpoint: two trainers in one folder would spoil it."""
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
