"""Lays the downloaded layers of an image or artifact out as a folder of files.

Of an image its /data, of an artifact its titled files and packed folders. Knows manifests and unpacking, not
where the blobs come from. Start at `unpack`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from runtime.errors import RegistryError
from runtime.oci import extract, manifests
from runtime.oci.blobs import Descriptor
from runtime.oci.extract import LayerBlob
from runtime.oci.image import LAYER_GZIP
from runtime.oci.manifests import ImageManifest, Kind
from runtime.oci.selection import Selection, select, select_all
from runtime.oci.tar import TarEntry
from runtime.oci.tree import ImageTree, shown

TITLE = "org.opencontainers.image.title"
FILE_PATH = "org.cncf.model.filepath"
_UNPACK = "io.deis.oras.content.unpack"
_UNPACKED_DIGEST = "io.deis.oras.content.digest"
_ROOT = "data"
"""Folder of an image that holds the files, as the controller has it."""


def unpack(
    manifest: ImageManifest,
    blobs: Sequence[Path],
    target: Path,
    where: str,
    *,
    check_size: Callable[[int], object] = lambda size: None,
) -> None:
    """Write the files of an image or artifact into the empty folder `target`.

    blobs: the verified blobs of the layers and, last, of the configuration.
    check_size: called with the bytes of the files before any is written.
    Raises RegistryError for content that is unsafe, damaged or empty.
    """
    *paths, config = blobs
    if manifest.kind == "image":
        layers = _layers(manifest, paths, manifests.diff_ids(config, where), where)
        selection = _read_image(layers, where)
    else:
        layers, selection = _read_artifact(manifest, paths, where)
    check_size(selection.size)
    extract.write(selection, layers, target)


def _layers(
    manifest: ImageManifest, paths: Sequence[Path], diff_ids: Sequence[str], where: str
) -> list[LayerBlob]:
    if diff_ids and len(diff_ids) != len(paths):
        raise RegistryError(
            f"{where}: {len(paths)} layers but {len(diff_ids)} diff_ids; the image is malformed"
        )
    stated: Sequence[str | None] = diff_ids or [None] * len(paths)
    return [
        LayerBlob(path, layer.digest, diff_id)
        for path, layer, diff_id in zip(paths, manifest.layers, stated, strict=True)
    ]


def _read_image(layers: Sequence[LayerBlob], where: str) -> Selection:
    tree = ImageTree()
    for number, layer in enumerate(layers):
        extract.read_layer(tree, layer, number)
    return select(tree, _ROOT, where)


def _read_artifact(
    manifest: ImageManifest, paths: Sequence[Path], where: str
) -> tuple[list[LayerBlob], Selection]:
    tree, layers = ImageTree(), []
    for number, (layer, path) in enumerate(zip(manifest.layers, paths, strict=True)):
        name = layer.annotations.get(FILE_PATH) or layer.annotations.get(TITLE) or ""
        packed = _is_folder(manifest.kind, layer, name)
        blob = LayerBlob(path, layer.digest, layer.annotations.get(_UNPACKED_DIGEST), is_archive=packed)
        layers.append(blob)
        if packed:
            extract.read_layer(tree, blob, number, whiteouts=False)
        elif name:
            _check_title(tree, name, where)
            tree.apply(TarEntry(name, "file", size=layer.size), number, whiteouts=False)
        elif layer.media_type != manifests.EMPTY:
            raise RegistryError(
                f"{where}: layer {layer.digest} has no title, so no file name; push it with one"
            )
    return layers, select_all(tree, where)


def _is_folder(kind: Kind, layer: Descriptor, name: str) -> bool:
    """Whether a layer of an artifact is a packed folder: Go's oras annotates it, oras-py sets the type."""
    if kind == "modelpack":
        return ".tar" in layer.media_type
    packed = layer.media_type == LAYER_GZIP and not name.endswith((".tar", ".gz", ".tgz"))
    return packed or layer.annotations.get(_UNPACK) == "true"


def _check_title(tree: ImageTree, name: str, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise RegistryError(f"{where}: layer title {shown(name)} leads out of the folder; refused")
    if tree.find(path.parts) is not None:
        raise RegistryError(f"{where}: two layers are titled {shown(name)}; push each file once")
