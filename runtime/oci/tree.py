"""The files of an image as a tree in memory, to which layers are applied one after the other.

Whiteouts and opaque markers hide what lower layers put there, never their own layer's entries (OCI
image-spec, layer.md). Links are followed inside the tree alone. Knows where content lies, not the content;
touches no disk. Start at `ImageTree.apply`; selection.py takes a folder out of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from runtime.errors import RegistryError
from runtime.oci.tar import TarEntry

MOST_ENTRIES = 250_000
"""Of all layers together, folders that no entry names included: an image with torch in it has some 60,000."""
MOST_NAMES_BYTES = 64 << 20
"""Of all names and link targets together, which are held in memory."""
MOST_DEPTH = 128
"""Folders inside each other."""
MOST_PATH_BYTES = 4096
MOST_NAME_BYTES = 255
"""Linux's limits for a path and for one name of it."""

_MOST_LINKS = 40
"""Followed for one path, as in Linux."""
_MOST_STEPS = 20_000_000
"""Names looked up for a whole image."""
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


@dataclass(slots=True)
class TreeFolder:
    """A folder; `layer` is the last that names it."""

    layer: int
    children: "dict[str, TreeNode]" = field(default_factory=dict)
    hidden_in: int = -1
    """The last layer that hid what lower ones put here: once is enough."""


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A file; its content is in the unpacked bytes of layer `source`. A hard link is the file once more."""

    layer: int
    source: int
    offset: int
    size: int
    executable: bool = False


@dataclass(frozen=True, slots=True)
class TreeLink:
    """A symbolic link, its target as written."""

    layer: int
    target: str


@dataclass(frozen=True, slots=True)
class TreeDevice:
    """A device, pipe or socket: harmless while nobody takes it out."""

    layer: int


TreeNode = TreeFolder | TreeFile | TreeLink | TreeDevice


@dataclass(frozen=True, slots=True)
class Found:
    """A node and its path from the root, free of links."""

    path: tuple[str, ...]
    node: TreeNode


class ImageTree:
    """The root folder, and the limits on what may be put into it."""

    def __init__(self) -> None:
        self.root = TreeFolder(0)
        self._entries = self._steps = self._names_bytes = 0

    def apply(self, entry: TarEntry, layer: int, *, whiteouts: bool = True) -> None:
        """Apply one entry of a layer; entries come in order, layer after layer, from the lowest on.

        Raises RegistryError when the entry breaks a limit or cannot be where it wants to be.
        """
        self._count(len(entry.name) + len(entry.target))
        parts = split(entry.name)
        if whiteouts and any(part.startswith(_WHITEOUT) for part in parts):
            self._hide(parts, layer, entry.name)
            return
        if not parts:
            if entry.kind != "folder":
                raise RegistryError(
                    f"layer entry {shown(entry.name)}: a {entry.kind} in place of the root; refused"
                )
            return
        parent = self._parent(parts, layer, entry.name)
        present = parent.children.get(parts[-1])
        if entry.kind == "folder":
            if isinstance(present, TreeFolder):
                present.layer = layer
            else:
                parent.children[parts[-1]] = TreeFolder(layer)
        else:
            parent.children[parts[-1]] = self._node(entry, layer)

    def _count(self, name_bytes: int) -> None:
        """Count one more node; RegistryError when there are too many, or their names are too long."""
        self._entries += 1
        self._names_bytes += name_bytes
        if self._entries > MOST_ENTRIES:
            raise RegistryError(f"layers hold more than {MOST_ENTRIES} entries; refused as a bomb")
        if self._names_bytes > MOST_NAMES_BYTES:
            raise RegistryError(
                f"layers hold names and links of more than {MOST_NAMES_BYTES} bytes; refused as a bomb"
            )

    def find(self, path: Sequence[str], *, follow: bool = True) -> Found | None:
        """Return what is at `path`, None when there is nothing; `..` at the root stays there.

        follow: whether a link at the end is followed too. Raises RegistryError for links in a circle.
        """
        return self._walk(path, follow=follow)

    def _node(self, entry: TarEntry, layer: int) -> TreeNode:
        if entry.kind == "file":
            return TreeFile(layer, layer, entry.offset, entry.size, entry.executable)
        if entry.kind == "link":
            return TreeLink(layer, entry.target)
        if entry.kind == "device":
            return TreeDevice(layer)
        found = self._walk(split(entry.target), follow=False)
        node = found.node if found is not None else None
        if isinstance(node, TreeFile):
            return TreeFile(layer, node.source, node.offset, node.size, node.executable)
        if isinstance(node, TreeLink):
            return TreeLink(layer, node.target)
        raise RegistryError(
            f"layer entry {shown(entry.name)}: a hard link to {shown(entry.target)},"
            " which is no file of the image; refused"
        )

    def _parent(self, parts: Sequence[str], layer: int, name: str) -> TreeFolder:
        """Return the folder to put the last of `parts` into, made where it is missing."""
        found = self._walk(parts[:-1], follow=True, create=layer)
        if found is None or not isinstance(found.node, TreeFolder):
            raise RegistryError(f"layer entry {shown(name)}: lies below something that is no folder; refused")
        return found.node

    def _walk(self, path: Iterable[str], *, follow: bool, create: int | None = None) -> Found | None:
        """Follow `path` from the root. create: the layer that makes the folders that are missing."""
        pending = list(path)[::-1]
        nodes: list[TreeNode] = [self.root]
        trail: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise RegistryError(f"layers take more than {_MOST_STEPS} steps to follow; refused as a bomb")
            if part == "..":
                if trail:
                    trail.pop()
                    nodes.pop()
                continue
            folder = nodes[-1]
            if not isinstance(folder, TreeFolder):
                return None
            node = folder.children.get(part)
            if node is None:
                if create is None:
                    return None
                self._count(len(part))
                node = folder.children[part] = TreeFolder(create)
            if isinstance(node, TreeLink) and (pending or follow):
                links += 1
                if links > _MOST_LINKS:
                    raise RegistryError(f"layers hold a link {shown(part)} that leads in a circle; refused")
                pending += link_parts(node.target)[::-1]
                if node.target.startswith("/"):
                    del trail[:], nodes[1:]
                continue
            trail.append(part)
            nodes.append(node)
            if create is not None and len(trail) >= MOST_DEPTH:
                raise RegistryError(f"layers hold more than {MOST_DEPTH} folders inside each other; refused")
        return Found(tuple(trail), nodes[-1])

    def _hide(self, parts: Sequence[str], layer: int, name: str) -> None:
        """Apply a whiteout or an opaque marker."""
        mark = parts[-1]
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]) or mark in {".wh.", ".wh..", ".wh..."}:
            raise RegistryError(f"layer entry {shown(name)}: a whiteout of no name; refused")
        found = self._walk(parts[:-1], follow=True)
        if found is None or not isinstance(folder := found.node, TreeFolder):
            return
        if mark == _OPAQUE:
            _hide_children(folder, layer)
        elif not mark.startswith(_WHITEOUT * 2):  # aufs' own records
            hidden = mark.removeprefix(_WHITEOUT)
            if hidden in folder.children and not _remains(folder.children[hidden], layer):
                del folder.children[hidden]


def split(name: str) -> list[str]:
    """Return the parts of an entry's path; RegistryError when it leads up or breaks a limit."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise RegistryError(f"layer entry {shown(name)}: a path with '..'; refused")
    if len(name.encode("utf-8", "surrogateescape")) > MOST_PATH_BYTES or any(
        len(part.encode("utf-8", "surrogateescape")) > MOST_NAME_BYTES for part in parts
    ):
        raise RegistryError(
            f"layer entry {shown(name)}: longer than the {MOST_PATH_BYTES} bytes of a path,"
            f" {MOST_NAME_BYTES} of one name; refused"
        )
    if len(parts) > MOST_DEPTH:
        raise RegistryError(f"layer entry {shown(name)}: more than {MOST_DEPTH} folders deep; refused")
    return parts


def link_parts(target: str) -> list[str]:
    """Return the parts of a link's target."""
    if not target or len(target) > MOST_PATH_BYTES:
        raise RegistryError(f"layers hold a link to {shown(target)}, no path of this system; refused")
    return [part for part in target.split("/") if part not in {"", "."}]


def shown(name: str) -> str:
    """Return a name for a message: quoted, and no longer than a line."""
    return repr(name if len(name) <= 120 else f"{name[:100]}…{PurePosixPath(name).name[-16:]}")


def _hide_children(folder: TreeFolder, layer: int) -> None:
    """Remove what lower layers put into `folder`, at every depth."""
    if folder.hidden_in == layer:
        return
    folder.hidden_in = layer
    for name in [name for name, node in folder.children.items() if not _remains(node, layer)]:
        del folder.children[name]


def _remains(node: TreeNode, layer: int) -> bool:
    """Hide what lower layers put into `node`, and return whether `layer` itself left something of it."""
    if isinstance(node, TreeFolder):
        _hide_children(node, layer)
        return node.layer == layer or bool(node.children)
    return node.layer == layer
