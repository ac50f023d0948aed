"""Takes one folder out of an image's tree: what of it goes to disk, under which paths.

A link that stays inside the folder is kept, as a relative one; one to a file elsewhere in the image becomes
that file, as a container would read it; all others are refused. Touches no disk. Start at `select`.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.errors import RegistryError
from runtime.oci.tree import (
    Found,
    ImageTree,
    TreeDevice,
    TreeFile,
    TreeFolder,
    TreeLink,
    TreeNode,
    link_parts,
    shown,
)


@dataclass(frozen=True, slots=True)
class Selection:
    """Paths relative to the selected folder; folders before what is in them."""

    folders: list[str] = field(default_factory=list)
    files: list[tuple[str, TreeFile]] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that writing the files takes; a file with two names is written twice."""
        return sum(file.size for _, file in self.files)


def select(tree: ImageTree, path: str, where: str) -> Selection:
    """Return the content of the folder at `path`, which may be a link to one.

    Raises RegistryError when it is missing or holds no file, or anything that is not to be written.
    """
    found = tree.find(path.split("/"))
    if found is None:
        raise RegistryError(
            f"{where}: the image holds no /{path}; expected adapter, dataset or weight files there"
        )
    if not isinstance(found.node, TreeFolder):
        raise RegistryError(
            f"{where}: /{path} is no folder; expected one with adapter, dataset or weight files"
        )
    return _select(tree, found, where, f"/{path}")


def select_all(tree: ImageTree, where: str) -> Selection:
    """Return the whole tree, or the content of a lone folder in it: `oras push adapter/` means that."""
    found = Found((), tree.root)
    if len(tree.root.children) == 1:
        (name, node), *_ = tree.root.children.items()
        found = Found((name,), node) if isinstance(node, TreeFolder) else found
    return _select(tree, found, where, "the artifact")


def _select(tree: ImageTree, top: Found, where: str, what: str) -> Selection:
    selection = Selection()
    for path, node in _below(top.node):
        name = "/".join(path)
        if isinstance(node, TreeFolder):
            selection.folders.append(name)
        elif isinstance(node, TreeFile):
            selection.files.append((name, node))
        elif isinstance(node, TreeDevice):
            raise RegistryError(
                f"{where}: {shown(name)} is a device or pipe; only files, folders and links are taken"
            )
        else:
            taken = _follow(tree, top, path, node)
            if taken is None:
                raise RegistryError(
                    f"{where}: {shown(name)} is a link to {shown(node.target)}, out of {what}; refused"
                )
            if isinstance(taken, TreeFile):
                selection.files.append((name, taken))
            else:
                selection.links.append((name, taken))
    if not selection.files:
        raise RegistryError(
            f"{where}: {what} holds no files; expected adapter, dataset or weight files there"
        )
    return selection


def _below(node: TreeNode) -> Iterator[tuple[tuple[str, ...], TreeNode]]:
    """Yield everything below a folder, a folder before what is in it."""
    pending: list[tuple[tuple[str, ...], TreeNode]] = [((), node)]
    while pending:
        path, node = pending.pop()
        if path:
            yield path, node
        if isinstance(node, TreeFolder):
            pending += [((*path, name), child) for name, child in sorted(node.children.items(), reverse=True)]


def _follow(tree: ImageTree, top: Found, path: tuple[str, ...], link: TreeLink) -> str | TreeFile | None:
    """Return the target to write for a link in the folder `top`, the file to write in its place, or None."""
    parent = (*top.path, *path[:-1])
    parts = link_parts(link.target)
    absolute = link.target.startswith("/")
    found = tree.find(parts if absolute else [*parent, *parts])
    if found is not None:
        target = found.path
    else:  # nothing there: harmless where it stays inside by its text alone
        text = posixpath.normpath("/" + "/".join(parts if absolute else [*parent, *parts]))
        target = tuple(part for part in text.split("/") if part)
    if target[: len(top.path)] == top.path:
        return posixpath.relpath("/" + "/".join(target), "/" + "/".join(parent))
    return found.node if found is not None and isinstance(found.node, TreeFile) else None
