"""Building images: the same files give the same bytes, whatever else."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError
from runtime.oci.image import LAYER_GZIP, LAYER_TAR
from tests.oci.conftest import files


def test_same_files_give_the_same_digest_whatever_their_times_and_modes(
    adapter: Path, tmp_path: Path
) -> None:
    first = oci.push(adapter, oci.parse(f"oci:{tmp_path}/one"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in sorted(files(adapter), reverse=True):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(adapter / name, copy / name)
        os.utime(copy / name, (1, 1))
        (copy / name).chmod(0o700)
    assert oci.push(copy, oci.parse(f"oci:{tmp_path}/two")) == first


def test_weights_go_plain_and_text_goes_compressed(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    layers = oci.inspect(reference).manifest.layers
    assert sorted(layer.media_type for layer in layers) == sorted([LAYER_GZIP, LAYER_TAR])
    weights = next(layer for layer in layers if layer.media_type == LAYER_TAR)
    blob = tmp_path / "out/blobs/sha256" / weights.digest.removeprefix("sha256:")
    with tarfile.open(blob) as archive:
        assert archive.getnames() == ["data", "data/adapter_model.safetensors"]


def test_diff_ids_are_the_digests_of_the_unpacked_layers(adapter: Path, tmp_path: Path) -> None:
    import gzip

    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    found = oci.inspect(reference).manifest
    blobs = tmp_path / "out/blobs/sha256"
    config = json.loads((blobs / found.config.digest[7:]).read_bytes())
    expected = []
    for layer in found.layers:
        data = (blobs / layer.digest[7:]).read_bytes()
        data = gzip.decompress(data) if layer.media_type == LAYER_GZIP else data
        expected.append(f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert config["rootfs"]["diff_ids"] == expected


def test_chosen_files_alone_are_pushed(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference, files=["adapter_config.json"])
    assert list(files(oci.pull(reference, tmp_path / "back"))) == ["adapter_config.json"]


@pytest.mark.parametrize("name", ["missing.json", "../adapter/x", "/etc/passwd"])
def test_file_that_is_not_in_the_folder_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file|out of"):
        oci.push(adapter, oci.parse(f"oci:{tmp_path}/out"), files=[name])
