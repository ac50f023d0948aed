"""Checkpoints kept in a registry or a layout: the newest whole one of this run wins."""

from pathlib import Path

import pytest

from runtime import oci
from runtime.oci import Access, Reference, checkpoints
from tests.oci.conftest import Started, files, fresh, quick

pytestmark = pytest.mark.system


@pytest.fixture(params=["registry", "layout"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Reference:
    if request.param == "layout":
        return oci.parse(checkpoints.beside(f"oci:{tmp_path}/layout:v1"))
    started: Started = request.getfixturevalue("open_registry")
    return oci.parse(checkpoints.beside(str(fresh(started.host, "adapter"))))


@pytest.fixture
def access() -> Access:
    return quick()


def state(tmp_path: Path, step: int) -> Path:
    folder = tmp_path / f"checkpoint-{step}"
    (folder / "rng").mkdir(parents=True, exist_ok=True)
    (folder / "optimizer.pt").write_bytes(step.to_bytes(4, "big") * 50_000)
    (folder / "rng/state.bin").write_bytes(b"rng")
    return folder


def test_newest_checkpoint_of_the_run_comes_back(place: Reference, access: Access, tmp_path: Path) -> None:
    assert str(place).endswith(":v1-checkpoint")
    assert checkpoints.find(place, job="a", access=access) == []
    for step in (10, 20, 30):
        checkpoints.push(state(tmp_path, step), place, step=step, job="a", access=access)
    found = checkpoints.find(place, job="a", access=access)
    assert [each.step for each in found] == [30, 20]
    back = oci.pull(found[0].image, tmp_path / "back", access=access)
    assert files(back) == files(state(tmp_path, 30))


def test_checkpoint_of_another_run_is_neither_found_nor_kept(
    place: Reference, access: Access, tmp_path: Path
) -> None:
    checkpoints.push(state(tmp_path, 50), place, step=50, job="old", access=access)
    assert checkpoints.find(place, job="new", access=access) == []
    assert checkpoints.push(state(tmp_path, 1), place, step=1, job="new", access=access)
    assert [each.step for each in checkpoints.find(place, job="new", access=access)] == [1]


def test_late_writer_does_not_undo_its_successor(place: Reference, access: Access, tmp_path: Path) -> None:
    checkpoints.push(state(tmp_path, 30), place, step=30, job="a", access=access)
    assert checkpoints.push(state(tmp_path, 20), place, step=20, job="a", access=access) is None
    assert [each.step for each in checkpoints.find(place, job="a", access=access)] == [30]


def test_same_checkpoint_twice_is_one(place: Reference, access: Access, tmp_path: Path) -> None:
    first = checkpoints.push(state(tmp_path, 30), place, step=30, job="a", access=access)
    assert checkpoints.push(state(tmp_path, 30), place, step=30, job="a", access=access) == first
    assert len(checkpoints.find(place, job="a", access=access)) == 1


def test_delete_leaves_the_output_alone(
    place: Reference, access: Access, adapter: Path, tmp_path: Path
) -> None:
    output = place.tagged("v1")
    oci.push(adapter, output, access=access)
    for step in (10, 20):
        checkpoints.push(state(tmp_path, step), place, step=step, job="a", access=access)
    checkpoints.delete(place, access=access)
    assert checkpoints.find(place, job="a", access=access) == []
    assert files(oci.pull(output, tmp_path / "back", access=access)) == files(adapter)


def test_layout_does_not_grow_with_every_checkpoint(access: Access, tmp_path: Path) -> None:
    place = oci.parse(f"oci:{tmp_path}/layout:v1-checkpoint")
    sizes = []
    for step in range(1, 7):
        checkpoints.push(state(tmp_path, step), place, step=step, job="a", access=access)
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "layout/blobs").rglob("*") if p.is_file()))
    assert sizes[-1] <= sizes[2] + 100
