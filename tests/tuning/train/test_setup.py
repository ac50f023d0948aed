"""Training resumes to the same bytes, after kills, damaged checkpoints, signals and full disks."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.tuning.identity import JobIdentity
from runtime.tuning.output import SENTINEL, OutputPaths
from runtime.tuning.settings import Output, TuningJob
from runtime.tuning.train.checkpoints import MANIFEST, fault, listed, step_of
from runtime.tuning.train.setup import run_training
from tests.tuning.conftest import Worker, tiny_job
from tests.tuning.train.test_trainer import training_setup

Maker = Callable[..., TuningJob]

ONE = JobIdentity({"training.learning_rate": 1e-4})
OTHER = JobIdentity({"training.learning_rate": 1e-3})

OFTEN = {"save_strategy": "steps", "save_steps": 4, "max_steps": 40}
EVERY_STEP = {**OFTEN, "save_steps": 1}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, rows_dir: Path) -> bytes:
    """The adapter of a run of 40 steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    worker = Worker(tiny_job(tiny_llama_dir, rows_dir, folder / "out", training=OFTEN))
    assert worker.wait() == 0, worker.output()
    return worker.adapter()


def kill_when(worker: Worker, holds: Callable[[], bool]) -> None:
    """SIGKILL the worker while `holds()`: suspended first, so that it still holds."""
    process = psutil.Process(worker.process.pid)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert worker.process.poll() is None, worker.output()
        if holds():
            process.suspend()
            if holds():
                worker.process.kill()
                worker.wait()
                return
            process.resume()
        time.sleep(0.0005)  # a checkpoint is half written for longer
    pytest.fail(f"the condition was never true: {worker.output()}")


def half_written(checkpoints: Path, name: str) -> bool:
    """Whether the newest checkpoint has file `name` and no manifest yet."""
    found = listed(checkpoints)
    return bool(found) and (found[-1] / name).exists() and not (found[-1] / MANIFEST).exists()


def newest_step(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint, complete or not; 0 where there is none."""
    return max(map(step_of, listed(checkpoints)), default=0)


@pytest.mark.slow
def test_fault_1_and_2_job_killed_anywhere_ends_with_the_same_bytes(
    make_job: Maker, uninterrupted: bytes
) -> None:
    job = make_job(training=EVERY_STEP)
    paths = OutputPaths(job.output.folder)
    kill_when(
        Worker(job),
        lambda: newest_step(paths.checkpoints) > 7 and half_written(paths.checkpoints, "optimizer.pt"),
    )
    assert fault(listed(paths.checkpoints)[-1]) == "it was not finished"
    kill_when(
        Worker(job),
        lambda: (paths.folder / "adapter_model.safetensors").exists() and not paths.sentinel.exists(),
    )
    last = Worker(job)
    assert last.wait() == 0, last.output()
    assert ": it was not finished" in last.output()
    assert last.output().count("resuming from checkpoint-") >= 2
    assert last.adapter() == uninterrupted
    assert paths.sentinel.exists()


@pytest.mark.slow
def test_fault_1_and_3_kill_then_damaged_checkpoint_ends_with_the_same_bytes(
    make_job: Maker, uninterrupted: bytes
) -> None:
    job = make_job(training=OFTEN)
    first = Worker(job)
    first.wait_for_step(13)
    first.process.kill()
    first.wait()
    assert not (job.output.folder / SENTINEL).exists()
    assert not (job.output.folder / "adapter_model.safetensors").exists()
    sealed = [
        path for path in listed(OutputPaths(job.output.folder).checkpoints) if (path / MANIFEST).exists()
    ]
    damaged = sealed[-1] / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    last = Worker(job)
    assert last.wait() == 0, last.output()
    assert f"skipping {sealed[-1].name}: adapter_model.safetensors is damaged" in last.output()
    assert "resuming from checkpoint-" in last.output()
    assert last.adapter() == uninterrupted


@pytest.mark.slow
def test_fault_4_sigterm_takes_a_checkpoint_exits_143_and_resumes_bit_exactly(
    make_job: Maker, uninterrupted: bytes, tmp_path: Path
) -> None:
    job = make_job(
        training={"save_strategy": "no", "max_steps": 40},
        output=Output(folder=tmp_path / "out", image=f"oci:{tmp_path}/layout:1"),
    )
    worker = Worker(job)
    worker.wait_for_step(9)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 143, worker.output()
    reason = worker.failure()
    assert (reason["code"], reason["phase"], reason["retriable"]) == (143, "train", True)
    assert reason["step"] >= 9
    assert not (job.output.folder / SENTINEL).exists()
    assert not (tmp_path / "layout").exists()
    rerun = Worker(job)
    assert rerun.wait() == 0, rerun.output()
    assert "resuming from checkpoint-" in rerun.output()
    assert rerun.adapter() == uninterrupted


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
    assert worker.wait() == 6, worker.output()
    reason = worker.failure()
    assert (reason["kind"], reason["phase"]) == ("CapacityError", "train")
    assert "no space left on the disk" in reason["message"]
    left = listed(OutputPaths(small_disk).checkpoints)
    assert left
    assert [fault(path) for path in left] == [None] * len(left)
    assert not (small_disk / SENTINEL).exists()


def test_checkpoints_come_by_the_clock_when_save_strategy_is_no(make_job: Maker) -> None:
    job = make_job(training={"save_strategy": "no", "max_steps": 8}, checkpoint_minutes=0.0005)
    folder = OutputPaths(job.output.folder).checkpoints
    run_training(training_setup(job), folder=folder, owner=ONE)
    assert listed(folder)


def test_checkpoints_of_another_job_are_not_resumed_from(
    make_job: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(training={**OFTEN, "max_steps": 8})
    folder = OutputPaths(job.output.folder).checkpoints
    run_training(training_setup(job), folder=folder, owner=ONE)
    caplog.clear()
    other = training_setup(job)
    run_training(other, folder=folder, owner=OTHER)
    assert "are another job's (learning_rate 0.0001, now 0.001): moved to" in caplog.text
    assert other.throughput.first_step == 0
