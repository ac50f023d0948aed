"""What of a folder is pushed: links that lead nowhere end it, links out of it are said and not followed."""

import logging
import os
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError
from runtime.oci.listing import list_files
from tests.oci.conftest import files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "a").write_text("a")
    (made / "sub/b").write_text("b")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    return made


def test_every_file_and_every_link_to_one_inside_is_pushed(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("sub/b")
    (folder / "sub/up").symlink_to(folder / "a")
    assert list_files(folder) == ["a", "link", "sub/b", "sub/up"]
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(folder, reference)
    assert files(oci.pull(reference, tmp_path / "back")) == {
        "a": b"a",
        "link": b"b",
        "sub/b": b"b",
        "sub/up": b"a",
    }


@pytest.mark.parametrize("target", ["../blobs/missing", "/nowhere", "itself"])
def test_a_dangling_link_is_named(folder: Path, target: str) -> None:
    (folder / "itself").symlink_to(target)
    with pytest.raises(ConfigError, match=f"itself: a link to '{target}', which does not exist"):
        list_files(folder)


def test_what_leads_out_is_said_and_not_pushed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").symlink_to("../outside/secret")
    (folder / "folder").symlink_to(tmp_path / "outside")
    (folder / "hop").symlink_to("folder/secret")
    (folder / "inner").symlink_to("sub")
    os.mkfifo(folder / "pipe")
    with caplog.at_level(logging.WARNING):
        assert list_files(folder) == ["a", "sub/b"]
    assert "not pushed: file, folder, hop, inner, pipe" in caplog.text


@pytest.mark.parametrize(
    "name", ["file", "folder/secret", "../outside/secret", "/etc/passwd", "sub/../../outside/secret"]
)
def test_a_file_out_of_the_folder_is_not_pushed_by_name_either(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / "file").symlink_to("../outside/secret")
    (folder / "folder").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="leads out of"):
        list_files(folder, [name])


def test_files_that_cannot_be_in_an_image_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="missing: no such file"):
        list_files(folder, ["missing"])
    with pytest.raises(ConfigError, match="sub: is no file"):
        list_files(folder, ["sub"])
    (folder / "sub/.wh.a").write_text("")
    with pytest.raises(ConfigError, match="removes files in an image"):
        list_files(folder)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds no files"), (tmp_path / "none", "no such directory")):
        with pytest.raises(ConfigError, match=message):
            list_files(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "a").chmod(0)
    with pytest.raises(ConfigError, match="a: not readable"):
        list_files(folder)
