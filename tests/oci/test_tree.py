"""Layers on top of each other, without a disk: whiteouts, opaque markers, links, limits."""

import pytest

from runtime.errors import RegistryError
from runtime.oci import tree as tree_module
from runtime.oci.tar import TarEntry
from runtime.oci.tree import ImageTree, TreeFile, TreeFolder
from tests.costs import assert_linear

BASE = ["data/", "data/adapter_config.json", "data/a.bin", "data/sub/", "data/sub/x"]


def entry(text: str) -> TarEntry:
    """`a/` is a folder, `a -> b` a link, `a == b` a hard link, `a!` a device, all others files."""
    if " -> " in text:
        name, target = text.split(" -> ")
        return TarEntry(name, "link", target=target)
    if " == " in text:
        name, target = text.split(" == ")
        return TarEntry(name, "hard link", target=target)
    if text.endswith("!"):
        return TarEntry(text[:-1], "device")
    return TarEntry(text, "folder" if text.endswith("/") else "file", size=1)


def apply(*layers: list[str]) -> ImageTree:
    tree = ImageTree()
    for number, layer in enumerate(layers):
        for text in layer:
            tree.apply(entry(text), number)
    return tree


def paths(tree: ImageTree) -> list[str]:
    """Files as `path@layer`, empty folders as `path/`."""
    found: list[str] = []

    def walk(folder: TreeFolder, above: str) -> None:
        for name, node in sorted(folder.children.items()):
            if isinstance(node, TreeFolder) and node.children:
                walk(node, f"{above}{name}/")
            elif isinstance(node, TreeFolder):
                found.append(f"{above}{name}/")
            else:
                found.append(f"{above}{name}@{node.source if isinstance(node, TreeFile) else '-'}")

    walk(tree.root, "")
    return found


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([BASE, [".wh.data", "data/", "data/new"]], ["data/new@1"]),
        ([BASE, ["data/", "data/new", ".wh.data"]], ["data/new@1"]),
        ([BASE, [".wh.data"], ["data/", "data/new"]], ["data/new@2"]),
        ([BASE, [".wh.data"]], []),
        ([BASE, ["data/", "data/.wh..wh..opq", "data/new"]], ["data/new@1"]),
        ([BASE, ["data/", "data/new", "data/.wh..wh..opq"]], ["data/new@1"]),
        ([BASE, [".wh..wh..opq", "data/new"]], ["data/new@1"]),
        (
            [BASE, ["data/sub/", "data/sub/n", "data/sub/.wh..wh..opq"]],
            ["data/a.bin@0", "data/adapter_config.json@0", "data/sub/n@1"],
        ),
        (
            [BASE, ["data/sub/n", "data/.wh..wh..opq"]],
            ["data/sub/n@1"],
        ),
        (
            [BASE, ["data/a.bin", "data/.wh.a.bin"]],
            ["data/a.bin@1", "data/adapter_config.json@0", "data/sub/x@0"],
        ),
        (
            [BASE, ["data/.wh.sub", "data/sub/"]],
            ["data/a.bin@0", "data/adapter_config.json@0", "data/sub/"],
        ),
        ([["a/b/c/d", "a/b/e"], ["a/b/.wh.c"]], ["a/b/e@0"]),
        ([["a/b/c/d", "a/b/e"], ["a/b/c/.wh.d", ".wh.nothing", "no/where/.wh.x"]], ["a/b/c/", "a/b/e@0"]),
        ([["a/b"], ["a/.wh.b"], ["a/b"]], ["a/b@2"]),
        ([["a"], ["a/", "a/b"]], ["a/b@1"]),
        ([["a/b"], ["a"]], ["a@1"]),
        ([["a/b"], ["a/", "a/c"]], ["a/b@0", "a/c@1"]),
        ([["a/.wh..wh.plnk", "a/.wh..wh.aufs", "a/b"]], ["a/b@0"]),
        ([["/a/b", "./c/./d"]], ["a/b@0", "c/d@0"]),
    ],
)  # fmt: skip
def test_layers_apply_as_oci_says(layers: list[list[str]], expected: list[str]) -> None:
    """What umoci 0.4.7 makes of the same layers, where it makes anything of them."""
    assert paths(apply(*layers)) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([["srv/d/", "data -> srv/d"], ["data/x"]], ["data@-", "srv/d/x@1"]),
        ([["srv/d/", "data -> /srv/d"], ["data/x"]], ["data@-", "srv/d/x@1"]),
        ([["srv/d/", "data -> ../../../srv/d"], ["data/x"]], ["data@-", "srv/d/x@1"]),
        ([["data -> srv/d"], ["data/x"]], ["data@-", "srv/d/x@1"]),
        ([["srv/d/y", "data -> srv/d"], ["data/", "data/x"]], ["data/x@1", "srv/d/y@0"]),
        ([["srv/d/y", "data -> srv/d"], ["data/", "data/.wh..wh..opq"]], ["data/", "srv/d/y@0"]),
        ([["d/f", "l -> d"], ["l/.wh.f"]], ["d/", "l@-"]),
        ([["d/f", "l -> d"], [".wh.l"]], ["d/f@0"]),
        ([["d/f", "l -> d"], ["l"]], ["d/f@0", "l@1"]),
        ([["data/d -> ..", "data/d/x"]], ["data/d@-", "x@0"]),
    ],
)
def test_links_are_followed_inside_the_image(layers: list[list[str]], expected: list[str]) -> None:
    """As containerd does: a folder replaces a link of its name, a file below it goes where the link leads."""
    assert paths(apply(*layers)) == expected


def test_hard_links_are_the_same_content_whatever_becomes_of_the_first_name() -> None:
    tree = apply(["a", "l -> a", "b == a", "c == ./b", "d == /l"], [".wh.a"])
    assert paths(tree) == ["b@0", "c@0", "d@-", "l@-"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (["../x"], "'..'"),
        (["data/../../x"], "'..'"),
        (["data/a", "data/a/b"], "no folder"),
        (["a -> b", "b -> a", "a/c"], "circle"),
        (["h == h"], "no file"),
        (["h == etc/passwd"], "no file"),
        (["d/", "h == d"], "no file"),
        (["p!", "h == p"], "no file"),
        (["h == ../etc/passwd"], "'..'"),
        (["."], "in place of the root"),
        (["data/.wh."], "no name"),
        (["data/.wh..."], "no name"),
        (["data/.wh.."], "no name"),
        (["data/.wh.x/y"], "no name"),
        (["n" * 256], "255"),
        (["d/" * 2100 + "f"], "4096"),
        (["d/" * 200 + "f"], "128 folders"),
        (["d/" * 100 + "f", f"l -> {'d/' * 100}", "l/" + "e/" * 100], "128 folders"),
    ],
)
def test_a_hostile_entry_is_refused(layer: list[str], message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        apply(layer)
    assert len(str(caught.value)) < 300


def test_too_many_entries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MOST_ENTRIES", 100)
    with pytest.raises(RegistryError, match="100 entries"):
        apply([f"a{number}" for number in range(60)], [f"a{number}" for number in range(60)])


def test_folders_that_no_entry_names_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MOST_ENTRIES", 100)
    with pytest.raises(RegistryError, match="100 entries"):
        apply([f"{number}/{'d/' * 40}f" for number in range(3)])


@pytest.mark.parametrize("entry", ["{number}{long}", "l{number} -> {long}", "h{number} == {long}"])
def test_names_that_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setattr(tree_module, "MOST_NAMES_BYTES", 5000)
    with pytest.raises(RegistryError, match="names and links of more than 5000 bytes"):
        apply([f"{'n' * 200}", *(entry.format(number=number, long="n" * 200) for number in range(40))])


def test_repeated_markers_do_not_take_quadratic_time() -> None:
    def apply_twice(count: int) -> None:
        files = [f"d/{number}" for number in range(count)]
        tree = apply(files, [*files, *(["d/.wh..wh..opq", ".wh.d"] * (count // 2))])
        assert len(paths(tree)) == count

    assert_linear(apply_twice, 500, 8_000)


def test_links_that_multiply_the_way_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_MOST_STEPS", 100_000)
    links = [f"l{number} -> {'./' * 0}{'x/../' * 300}l{number + 1}" for number in range(30)]
    with pytest.raises(RegistryError, match="steps"):
        apply(["x/", "l30/", *links, *(["l0/f"] * 1000)])
