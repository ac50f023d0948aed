"""Blobs arrive as they are stored, whatever a front says of them, and never more than was announced."""

import gzip
import random
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError
from runtime.oci.blobs import from_bytes
from runtime.oci.image import CONFIG, LAYER_GZIP, assemble
from tests.faults.registry import FaultyRegistry
from tests.oci.conftest import archive, files, fresh, quick

pytestmark = pytest.mark.system


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip"])
def test_a_front_that_labels_tar_gz_files_changes_nothing(
    faulty: FaultyRegistry, tmp_path: Path, encoding: str
) -> None:
    """Apache's mime_magic labels what looks like gzip; the digest is of the stored bytes."""
    content = random.Random(1).randbytes(300_000)
    layer = from_bytes(gzip.compress(archive(("data/w", content)), mtime=0), LAYER_GZIP)
    image = assemble([layer], from_bytes(b"{}", CONFIG), annotations={})
    reference = fresh(faulty.host, "labelled")
    oci.push_image(lambda: image, reference, access=quick())
    data = b"".join(iter(layer.open().read, b""))
    headers = {"Content-Encoding": encoding}
    faulty.routes[f"/v2/{reference.repository}/blobs/{layer.descriptor.digest}"] = lambda *_: (
        200, headers, data,
    )  # fmt: skip
    assert files(oci.pull(reference, tmp_path / "back", access=quick())) == {"w": content}


def test_a_blob_longer_than_the_manifest_says_is_refused(faulty: FaultyRegistry, tmp_path: Path) -> None:
    layer = from_bytes(archive(("data/w", b"w")), LAYER_GZIP)
    image = assemble([layer], from_bytes(b"{}", CONFIG), annotations={})
    reference = fresh(faulty.host, "longer")
    oci.push_image(lambda: image, reference, access=quick())
    faulty.routes[f"/v2/{reference.repository}/blobs/{layer.descriptor.digest}"] = lambda *_: (
        200, {}, bytes(layer.descriptor.size + 1),
    )  # fmt: skip
    with pytest.raises(RegistryError, match="longer than the"):
        oci.pull(reference, tmp_path / "back", access=quick())
