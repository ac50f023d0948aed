"""CNCF ModelPack artifacts are built and read."""

from pathlib import Path

import pytest

from runtime import oci
from runtime.oci import modelpack
from runtime.oci.blobs import from_bytes
from runtime.oci.image import assemble
from tests.oci.conftest import archive, files


@pytest.mark.parametrize("form", ["raw", "tar"])
def test_modelpack_artifact_is_read(tmp_path: Path, adapter: Path, form: str) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    if form == "raw":
        oci.push_image(lambda: modelpack.build(adapter), reference)
    else:
        data = archive(*((name, data) for name, data in files(adapter).items()))
        layer = from_bytes(data, "application/vnd.cncf.model.weight.v1.tar")
        config = from_bytes(b"{}", "application/vnd.cncf.model.config.v1+json")
        oci.push_image(lambda: assemble([layer], config, annotations={}), reference)
    assert oci.inspect(reference).manifest.kind == "modelpack"
    assert files(oci.pull(reference, tmp_path / "back")) == files(adapter)
