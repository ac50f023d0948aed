"""Foreign images and artifacts are read (fault test 37)."""

import gzip
import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import RegistryError
from runtime.oci.blobs import Blob, from_bytes
from runtime.oci.image import CONFIG, LAYER_GZIP, LAYER_TAR, assemble
from tests.oci.conftest import Started, archive, files, fresh, quick, special, store, titled

IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"


def test_37_controllers_new_form_is_read(tmp_path: Path) -> None:
    """As its pusher makes it: one tar.gz titled layer.tar.gz, a configuration with nothing but diff_ids."""
    plain = archive(("data/adapter_config.json", b"{}"), ("data/adapter_model.safetensors", b"weights"))
    layer = titled(gzip.compress(plain), LAYER_GZIP, org__opencontainers__image__title="layer.tar.gz")
    diff = f"sha256:{hashlib.sha256(plain).hexdigest()}"
    reference = store(tmp_path, [layer], {"rootfs": {"diff_ids": [diff]}})
    expected = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert files(oci.pull(reference, tmp_path / "back")) == expected


def test_37_controllers_old_form_is_read(tmp_path: Path) -> None:
    """As docker build made it: a base with links, devices and much else, then one layer per ADD."""
    base = archive(
        ("bin/busybox", b"elf"),
        special("bin/sh", tarfile.LNKTYPE, "bin/busybox"),
        special("etc/mtab", tarfile.SYMTYPE, "/proc/mounts"),
        special("dev/null", tarfile.CHRTYPE),
        special("data", tarfile.DIRTYPE),
    )
    layers = [base, archive(("data/adapter_config.json", b"{}")), archive(("./data/w.safetensors", b"w"))]
    reference = store(tmp_path, [from_bytes(gzip.compress(layer), LAYER_GZIP) for layer in layers])
    back = oci.pull(reference, tmp_path / "back")
    assert files(back) == {"adapter_config.json": b"{}", "w.safetensors": b"w"}


def test_wrong_diff_id_is_an_error(tmp_path: Path) -> None:
    layer = from_bytes(archive(("data/a", b"a")), LAYER_TAR)
    reference = store(tmp_path, [layer], {"rootfs": {"diff_ids": ["sha256:" + "0" * 64]}})
    with pytest.raises(RegistryError, match="the image says"):
        oci.pull(reference, tmp_path / "back")


def test_image_without_data_is_an_error(tmp_path: Path) -> None:
    reference = store(tmp_path, [from_bytes(archive(("etc/passwd", b"")), LAYER_TAR)])
    with pytest.raises(RegistryError, match="no /data"):
        oci.pull(reference, tmp_path / "back")


def artifact(tmp_path: Path, layers: list[Blob]) -> oci.Reference:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    config = from_bytes(b"{}", "application/vnd.unknown.config.v1+json")
    oci.push_image(lambda: assemble(layers, config, annotations={}), reference)
    return reference


def test_oras_files_and_folders_are_read(tmp_path: Path) -> None:
    packed = gzip.compress(archive(("weights/model.safetensors", b"w"), ("weights/config.json", b"{}")))
    folder = titled(packed, LAYER_GZIP, org__opencontainers__image__title="weights")
    folder.descriptor.annotations["io.deis.oras.content.unpack"] = "true"
    back = oci.pull(artifact(tmp_path, [folder]), tmp_path / "back")
    assert files(back) == {"model.safetensors": b"w", "config.json": b"{}"}
    single = titled(b"text", LAYER_TAR, org__opencontainers__image__title="docs/README.md")
    back = oci.pull(artifact(tmp_path, [folder, single]), tmp_path / "both")
    assert set(files(back)) == {"weights/model.safetensors", "weights/config.json", "docs/README.md"}


@pytest.mark.system
def test_what_plain_oras_pushes_is_read(
    open_registry: Started, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import oras.client

    reference = fresh(open_registry.host, "oras")
    monkeypatch.chdir(adapter.parent)
    client = oras.client.OrasClient(insecure=True)
    client.push(str(reference), files=["adapter"], quiet=True)
    assert files(oci.pull(reference, tmp_path / "back", access=quick())) == files(adapter)


@pytest.mark.parametrize("name", ["../out", "/etc/cron.d/x", "a/../../out", ""])
def test_artifact_title_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    bad = titled(b"x", "text/plain", org__opencontainers__image__title=name)
    with pytest.raises(RegistryError, match=r"out of the folder|no title"):
        oci.pull(artifact(tmp_path, [bad]), tmp_path / "back")
    assert not (tmp_path / "out").exists()


def test_index_gives_the_image_of_this_machine(tmp_path: Path) -> None:
    import platform

    from runtime.oci.layout import Layout
    from runtime.oci.store import StoredManifest

    here = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    other = "arm64" if here == "amd64" else "amd64"
    entries = []
    for machine in (other, here):
        layer = from_bytes(archive(("data/machine", machine.encode())), LAYER_TAR)
        image = assemble([layer], from_bytes(b"{}", CONFIG), annotations={})
        oci.push_image(lambda image=image: image, oci.parse(f"oci:{tmp_path}/layout:{machine}"))
        entry = {"mediaType": image.media_type, "digest": image.digest, "size": len(image.manifest)}
        entries.append(entry | {"platform": {"os": "linux", "architecture": machine}})
    index = "application/vnd.oci.image.index.v1+json"
    data = json.dumps({"schemaVersion": 2, "mediaType": index, "manifests": entries}).encode()
    Layout(tmp_path / "layout").put_manifest(StoredManifest(data, index), "all")
    back = oci.pull(oci.parse(f"oci:{tmp_path}/layout:all"), tmp_path / "back")
    assert files(back) == {"machine": here.encode()}


@pytest.mark.parametrize(
    "data", [b"[]", b"{}", b'{"config":{},"layers":[]}', b"<html>", b'{"config":1,"layers":2}']
)
def test_strange_manifest_is_an_error(tmp_path: Path, data: bytes) -> None:
    from runtime.oci.layout import Layout
    from runtime.oci.store import StoredManifest

    layout = Layout(tmp_path / "layout")
    with layout.writing():
        layout.put_manifest(StoredManifest(data, "application/vnd.oci.image.manifest.v1+json"), "v1")
    with pytest.raises(RegistryError, match="not an image manifest"):
        oci.pull(oci.parse(f"oci:{tmp_path}/layout:v1"), tmp_path / "back")
