"""What is taken out of an image: /data wherever it is, links inside it, files that links lead to."""

import pytest

from runtime.errors import RegistryError
from runtime.oci.selection import Selection, select, select_all
from tests.oci.test_tree import apply


def taken(*layers: list[str]) -> Selection:
    return select(apply(*layers), "data", "IMAGE")


def test_files_folders_and_links_come_with_paths_below_data() -> None:
    selection = taken(["etc/passwd", "data/a", "data/sub/b", "data/empty/", "data/sub/l -> ../a"])
    assert selection.folders == ["empty", "sub"]
    assert [name for name, _ in selection.files] == ["a", "sub/b"]
    assert selection.links == [("sub/l", "../a")]
    assert selection.size == 2


@pytest.mark.parametrize(
    "link", ["srv/m", "/srv/m", "../../srv/m", "/opt/hop", "srv/m/.", "/srv/../srv/m/../m/"]
)
def test_data_may_be_a_link(link: str) -> None:
    selection = taken(["srv/m/w", "srv/m/l -> /data/w", "opt/hop -> ../srv/m", f"data -> {link}"])
    assert [name for name, _ in selection.files] == ["w"]
    assert selection.links == [("l", "w")]


@pytest.mark.parametrize(
    ("link", "written"),
    [
        ("data/l -> a", "a"),
        ("data/l -> /data/a", "a"),
        ("data/l -> ../data/a", "a"),
        ("data/l -> ../../../data/./sub/../a", "a"),
        ("data/sub/l -> ../a", "../a"),
        ("data/sub/l -> hop/a", "../a"),
        ("data/l -> sub", "sub"),
        ("data/l -> .", "."),
        ("data/l -> not/there", "not/there"),
        ("data/sub/l -> /data/not/there", "../not/there"),
    ],
)
def test_links_inside_are_kept_as_relative_ones(link: str, written: str) -> None:
    selection = taken(["data/a", "data/sub/b", "data/sub/hop -> ..", link])
    assert dict(selection.links)[link.partition(" ")[0].removeprefix("data/")] == written


def test_a_link_to_a_file_elsewhere_in_the_image_becomes_the_file() -> None:
    """A snapshot of the hub's cache: its files are links to blobs beside it."""
    selection = taken(["hub/blobs/abc", "hub/snap/w -> ../blobs/abc", "hub/snap/x -> w", "data -> /hub/snap"])
    assert [name for name, _ in selection.files] == ["w", "x"]
    assert selection.size == 2


@pytest.mark.parametrize(
    "layer",
    [
        ["data/x -> /etc/passwd"],
        ["data/x -> ../../etc"],
        ["data/a -> .", "data/b -> a/../.."],
        ["data/d -> ..", "data/d/x"],
        ["etc/ssl/", "data/x -> /etc"],
        ["data/x -> y", "data/y -> x"],
        ["data/b/c", "data/x -> b", "data/y -> x/../..", "data/z -> y/.."],
        ["data/p!"],
        ["data/x -> "],
    ],
)
def test_what_leads_out_is_refused(layer: list[str]) -> None:
    with pytest.raises(RegistryError, match=r"refused|device or pipe"):
        taken(["data/a", *layer])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([["etc/passwd"]], "no /data"),
        ([["data"]], "/data is no folder"),
        ([["data -> nowhere"]], "no /data"),
        ([["data/"]], "holds no files"),
        ([["data/sub/"]], "holds no files"),
        ([["data/a"], ["data/.wh.a"]], "holds no files"),
        ([["data/a"], [".wh.data"]], "no /data"),
        ([["data -> data"]], "circle"),
    ],
)
def test_an_empty_result_is_an_error(layers: list[list[str]], message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        taken(*layers)


def test_devices_elsewhere_do_not_matter() -> None:
    assert taken(["dev/null!", "etc/mtab -> /proc/mounts", "data/a"]).size == 1


def test_the_content_of_a_lone_folder_is_lifted_and_links_are_checked_after_it() -> None:
    assert [name for name, _ in select_all(apply(["w/a", "w/s/b"]), "X").files] == ["a", "s/b"]
    assert select_all(apply(["w/a", "w/l -> ../w/a"]), "X").links == [("l", "a")]
    assert [name for name, _ in select_all(apply(["w/a", "b"]), "X").files] == ["b", "w/a"]
    with pytest.raises(RegistryError, match="refused"):
        select_all(apply(["w/a", "w/l -> ../../x"]), "X")
