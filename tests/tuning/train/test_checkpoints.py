"""Whole or ignored: fault test 3 for every file and every kind of damage."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.tuning.identity import JobIdentity
from runtime.tuning.train import checkpoints

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def write(root: Path, step: int, *, sealed: bool = True) -> Path:
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(f"{name} {step}".encode() * 20)
    if sealed:
        checkpoints.seal(folder)
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "removed"])
@pytest.mark.parametrize("name", [*FILES, checkpoints.MANIFEST])
def test_fault_3_damaged_newest_is_passed_over_with_its_reason(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 8), write(tmp_path, 12)
    damage(newer / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest(tmp_path) == older
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("skipping checkpoint-12: ")
    damage(older / name)
    assert checkpoints.newest(tmp_path) is None


def test_fault_2_checkpoint_without_its_manifest_is_not_one(tmp_path: Path) -> None:
    older = write(tmp_path, 8)
    write(tmp_path, 12, sealed=False)
    assert checkpoints.newest(tmp_path) == older
    (tmp_path / "checkpoint-12" / f"{checkpoints.MANIFEST}.part").write_text("{")
    assert checkpoints.newest(tmp_path) == older


def test_newest_goes_by_number_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 9)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-9"
    assert checkpoints.newest(write(tmp_path, 10).parent) == tmp_path / "checkpoint-10"


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "absent") is None


def test_prune_keeps_the_newest_and_never_all(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, None)
    assert len(checkpoints.listed(tmp_path)) == 3
    checkpoints.prune(tmp_path, 2)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [8, 12]
    checkpoints.prune(tmp_path, 0)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [12]


def test_checkpoint_of_weights_alone_is_passed_over_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 8), write(tmp_path, 12, sealed=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newer / name).unlink()
    checkpoints.seal(newer)
    assert checkpoints.newest(tmp_path) == older
    (record,) = caplog.records
    assert record.getMessage() == (
        "skipping checkpoint-12: it holds weights only (optimizer.pt, scheduler.pt missing)"
    )


FIRST, SECOND = (JobIdentity({"training.learning_rate": rate}) for rate in (1e-4, 1e-3))


def test_other_jobs_checkpoints_are_moved_aside_and_back_with_their_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, history = tmp_path / "checkpoints", tmp_path / "history.jsonl"
    checkpoints.claim(folder, FIRST, history=history)
    write(folder, 8), write(folder, 12)
    history.write_text("first")
    checkpoints.claim(folder, FIRST, history=history)
    assert checkpoints.newest(folder) == folder / "checkpoint-12"
    assert not caplog.records

    checkpoints.claim(folder, SECOND, history=history)
    (record,) = caplog.records
    aside = tmp_path / f"checkpoints-of-{FIRST.digest[:12]}"
    for part in ("learning_rate 0.0001, now 0.001", str(aside), "2 checkpoints up to step 12", "0.0 MiB"):
        assert part in record.getMessage()
    assert checkpoints.newest(folder) is None
    assert not history.exists()
    write(folder, 3)
    history.write_text("second")

    checkpoints.claim(folder, FIRST, history=history)
    assert checkpoints.newest(folder) == folder / "checkpoint-12"
    assert history.read_text() == "first"
    assert not aside.exists()
    assert checkpoints.newest(tmp_path / f"checkpoints-of-{SECOND.digest[:12]}") is not None


def test_checkpoints_of_a_job_that_is_not_recorded_are_moved_aside_each_to_its_own_place(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        write(folder, step)
        (folder / "job").write_text("a digest, as releases up to 0.4 wrote it")
        (folder / checkpoints.OWNER).unlink(missing_ok=True)
        checkpoints.claim(folder, FIRST)
    assert [path.name for path in sorted(tmp_path.rglob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
