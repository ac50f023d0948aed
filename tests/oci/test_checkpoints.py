"""Checkpoints kept in a registry or a layout: the newest whole one of this run wins."""

from dataclasses import replace
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError
from runtime.oci import Access, Reference, checkpoints
from tests.oci.conftest import Started, files, fresh, quick
from tests.oci.keypairs import make_pair

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


def run(job: str) -> checkpoints.Run:
    return checkpoints.Run(job, f"the-{job}")


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
        checkpoints.push(state(tmp_path, step), place, step=step, run=run("a"), access=access)
    found = checkpoints.find(place, job="a", access=access)
    assert [each.step for each in found] == [30, 20]
    back = oci.pull(found[0].image, tmp_path / "back", access=access)
    assert files(back) == files(state(tmp_path, 30))


def test_checkpoints_are_signed_and_their_signatures_go_with_them(
    place: Reference, access: Access, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path)
    signing = replace(run("a"), key=oci.read_private(pair.private))
    digests = [
        checkpoints.push(state(tmp_path, step), place, step=step, run=signing, access=access)
        for step in (10, 20, 30)
    ]
    required = access.requiring([str(pair.public)])
    for each in checkpoints.find(place, job="a", access=access):
        assert oci.pull(each.image, tmp_path / f"back-{each.step}", access=required)
    checkpoints.delete(place, run=signing, access=access)
    for digest in filter(None, digests):
        with pytest.raises(RegistryError, match="is not signed"):
            oci.verify(place, digest, [str(pair.public)], access=access)


def test_checkpoint_of_another_job_is_never_replaced(
    place: Reference, access: Access, tmp_path: Path
) -> None:
    for step in (40, 50):
        checkpoints.push(state(tmp_path, step), place, step=step, run=run("old"), access=access)
    assert checkpoints.find(place, job="new", access=access) == []
    found = checkpoints.others(place, job="new", access=access)
    assert [other.what for other in found] == [f"step {n} of another job, the-old" for n in (50, 40)]
    with pytest.raises(RegistryError, match="holds step 50 of another job, the-old, which is kept"):
        checkpoints.push(state(tmp_path, 1), place, step=1, run=run("new"), access=access)
    checkpoints.delete(place, run=run("new"), access=access)
    assert [each.step for each in checkpoints.find(place, job="old", access=access)] == [50, 40]


def test_what_a_run_found_at_its_start_is_replaced_where_it_may(
    place: Reference, access: Access, tmp_path: Path
) -> None:
    for step in (40, 50):
        checkpoints.push(state(tmp_path, step), place, step=step, run=run("old"), access=access)
    found = checkpoints.others(place, job="new", access=access)
    new = replace(run("new"), replaces={other.digest for other in found})
    for step in (1, 2):
        assert checkpoints.push(state(tmp_path, step), place, step=step, run=new, access=access)
    assert [each.step for each in checkpoints.find(place, job="new", access=access)] == [2, 1]
    assert checkpoints.others(place, job="new", access=access) == []
    with pytest.raises(RegistryError, match="the-new"):  # of the replaced job, by a pod that lives on
        checkpoints.push(state(tmp_path, 60), place, step=60, run=run("old"), access=access)


def test_image_that_is_no_checkpoint_is_kept(
    place: Reference, access: Access, adapter: Path, tmp_path: Path
) -> None:
    oci.push(adapter, place, access=access)
    with pytest.raises(RegistryError, match="holds an image that is no checkpoint"):
        checkpoints.push(state(tmp_path, 1), place, step=1, run=run("a"), access=access)
    checkpoints.delete(place, run=run("a"), access=access)
    assert files(oci.pull(place, tmp_path / "back", access=access)) == files(adapter)


def test_late_writer_does_not_undo_its_successor(place: Reference, access: Access, tmp_path: Path) -> None:
    checkpoints.push(state(tmp_path, 30), place, step=30, run=run("a"), access=access)
    assert checkpoints.push(state(tmp_path, 20), place, step=20, run=run("a"), access=access) is None
    assert [each.step for each in checkpoints.find(place, job="a", access=access)] == [30]


def test_same_checkpoint_twice_is_one(place: Reference, access: Access, tmp_path: Path) -> None:
    first = checkpoints.push(state(tmp_path, 30), place, step=30, run=run("a"), access=access)
    assert checkpoints.push(state(tmp_path, 30), place, step=30, run=run("a"), access=access) == first
    assert len(checkpoints.find(place, job="a", access=access)) == 1


def test_delete_leaves_the_output_alone(
    place: Reference, access: Access, adapter: Path, tmp_path: Path
) -> None:
    output = place.tagged("v1")
    oci.push(adapter, output, access=access)
    for step in (10, 20):
        checkpoints.push(state(tmp_path, step), place, step=step, run=run("a"), access=access)
    checkpoints.delete(place, run=run("a"), access=access)
    assert checkpoints.find(place, job="a", access=access) == []
    assert files(oci.pull(output, tmp_path / "back", access=access)) == files(adapter)


def test_layout_does_not_grow_with_every_checkpoint(access: Access, tmp_path: Path) -> None:
    place = oci.parse(f"oci:{tmp_path}/layout:v1-checkpoint")
    sizes = []
    for step in range(1, 7):
        checkpoints.push(state(tmp_path, step), place, step=step, run=run("a"), access=access)
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "layout/blobs").rglob("*") if p.is_file()))
    assert sizes[-1] <= sizes[2] + 100
