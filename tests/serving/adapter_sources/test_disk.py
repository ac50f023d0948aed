"""Files of adapters on disk: what leaves first, what never does, and what a restart finds."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.serving.adapter_sources.disk import AdapterFiles

DIGESTS = [f"sha256:{number:064x}" for number in range(4)]


class Shelf:
    """A folder of files with room for `most` bytes."""

    def __init__(self, root: Path | None, most: int = 250) -> None:
        self.evicted = 0
        self.files = AdapterFiles(root, most_bytes=most, on_evicted=self._count)

    def _count(self) -> None:
        self.evicted += 1

    def put(self, digest: str, size: int = 100) -> Path:
        with self.files.holding(digest) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "weights").write_bytes(bytes(size))
        return folder


def test_the_least_recently_used_files_leave_and_held_ones_never(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "cache")
    first, second = shelf.put(DIGESTS[0]), shelf.put(DIGESTS[1])
    with shelf.files.holding(DIGESTS[0]):  # used again
        pass
    third = shelf.put(DIGESTS[2])
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    assert shelf.evicted == 1
    with shelf.files.holding(DIGESTS[0]):
        shelf.files.make_room(240)
        assert (first.exists(), third.exists()) == (True, False)
    shelf.files.close()


def test_a_pull_that_fails_leaves_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(ValueError, match="broken"), shelf.files.holding(DIGESTS[0]) as folder:
        (folder.parent / ".image.blobs").mkdir(parents=True)
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []
    shelf.files.close()


def test_a_restart_finds_what_was_there_and_takes_out_what_was_begun(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    kept = shelf.put(DIGESTS[0])
    (tmp_path / DIGESTS[1].replace(":", "-") / ".image.blobs").mkdir(parents=True)
    shelf.files.close()
    again = Shelf(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [kept.parent.name]
    again.files.close()
    smaller = Shelf(tmp_path, most=50)
    assert (list(tmp_path.iterdir()), smaller.evicted) == ([], 1)
    smaller.files.close()


def test_a_folder_belongs_to_one_server(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(ConfigError, match="another server uses it"):
        Shelf(tmp_path)
    shelf.files.close()
    Shelf(tmp_path).files.close()


def test_without_a_folder_files_go_with_the_server() -> None:
    shelf = Shelf(None)
    folder = shelf.put(DIGESTS[0])
    assert folder.exists()
    shelf.files.close()
    assert not folder.parent.parent.exists()
