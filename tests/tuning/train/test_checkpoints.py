"""Whole or ignored: fault test 3 for every file and every kind of damage."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.tuning.train import checkpoints

FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth")


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
