"""Foreign images and artifacts become folders (fault test 37)."""

import gzip
import hashlib
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"rootfs":{"diff_ids":["sha256:' + b"0" * 64 + b'"]}}', "the image says"),
        (b'{"rootfs":{"diff_ids":["sha256:a","sha256:b"]}}', "1 layers but 2 diff_ids"),
        (b'{"rootfs":{"diff_ids":"abc"}}', "no image configuration"),
        (b'{"rootfs":{"diff_ids":[1]}}', "no image configuration"),
        (b"[]", "no image configuration"),
        (b"<html>", "no image configuration"),
        (b"[" * 100_000, "no image configuration"),
    ],
    ids=["other digest", "too many", "text", "numbers", "array", "html", "nested"],
)
def test_layers_that_are_not_the_configurations_are_refused(
    tmp_path: Path, config: bytes, message: str
) -> None:
    layer = from_bytes(gzip.compress(archive(("data/a", b"a"))), LAYER_GZIP)
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    oci.push_image(lambda: assemble([layer], from_bytes(config, CONFIG), annotations={}), reference)
    with pytest.raises(RegistryError, match=message):
        oci.pull(reference, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout"]


WHITEOUTS = {
    "RUN rm -rf /data; COPY new /data (one layer)": ([[".wh.data", "data/new"]], {"new"}),
    "the same in two layers": ([[".wh.data"], ["data/new"]], {"new"}),
    "RUN rm -rf /data": ([[".wh.data"]], None),
    "RUN rm -rf /data && mkdir /data (opaque)": ([["data/.wh..wh..opq", "data/new"]], {"new"}),
    "opaque marker after the layer's own file": (
        [["data/sub/n", "data/sub/.wh..wh..opq"]], {"a.bin", "adapter_config.json", "sub/n"},
    ),
    "whiteout after the layer's own file": (
        [["data/a.bin", "data/.wh.a.bin"]], {"a.bin", "adapter_config.json", "sub/x"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WHITEOUTS)
def test_whiteouts_hide_what_is_below_them(tmp_path: Path, case: str) -> None:
    """What umoci 0.4.7 makes of the same images."""
    above, expected = WHITEOUTS[case]
    base = archive(*((f"data/{name}", b"old") for name in ("adapter_config.json", "a.bin", "sub/x")))
    layers = [base, *(archive(*((name, b"new") for name in layer)) for layer in above)]
    reference = store(tmp_path, [from_bytes(gzip.compress(layer), LAYER_GZIP) for layer in layers])
    if expected is None:
        with pytest.raises(RegistryError, match="no /data"):
            oci.pull(reference, tmp_path / "back")
    else:
        found = files(oci.pull(reference, tmp_path / "back"))
        assert set(found) == expected
        assert (found.get("a.bin", b"new") == b"new") == (case != "opaque marker after the layer's own file")


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


def test_an_artifact_that_says_what_it_unpacks_to_is_held_to_it(tmp_path: Path) -> None:
    plain = archive(("w/model.safetensors", b"w"))
    for digest in (f"sha256:{hashlib.sha256(plain).hexdigest()}", "sha256:" + "0" * 64):
        folder = titled(gzip.compress(plain), LAYER_GZIP, org__opencontainers__image__title="w")
        folder.descriptor.annotations["io.deis.oras.content.unpack"] = "true"
        folder.descriptor.annotations["io.deis.oras.content.digest"] = digest
        reference = artifact(tmp_path, [folder])
        if digest.endswith("0"):
            with pytest.raises(RegistryError, match="the image says"):
                oci.pull(reference, tmp_path / "wrong")
        else:
            assert files(oci.pull(reference, tmp_path / "right")) == {"model.safetensors": b"w"}


def test_files_of_an_artifact_that_begin_with_a_whiteouts_letters_are_files(tmp_path: Path) -> None:
    layers: list[Blob] = [
        titled(data, "text/plain", org__opencontainers__image__title=name)
        for name, data in ((".wh.a", b"1"), ("a", b"2"))
    ]
    assert files(oci.pull(artifact(tmp_path, layers), tmp_path / "back")) == {".wh.a": b"1", "a": b"2"}


@pytest.mark.parametrize(
    ("titles", "message"),
    [(["a", "a"], "are titled 'a'"), (["a", "a/b"], "no folder"), ([""], "no title"), ([], "no files")],
    ids=["twice", "below a file", "none", "no layer"],
)  # fmt: skip
def test_titles_that_exclude_each_other_are_refused(tmp_path: Path, titles: list[str], message: str) -> None:
    layers: list[Blob] = [
        titled(bytes([number]), "text/plain", org__opencontainers__image__title=title)
        for number, title in enumerate(titles)
    ]
    with pytest.raises(RegistryError, match=message):
        oci.pull(artifact(tmp_path, layers), tmp_path / "back")


def test_the_placeholder_of_an_artifact_without_files_is_no_file(tmp_path: Path) -> None:
    layers: list[Blob] = [from_bytes(b"{}", "application/vnd.oci.empty.v1+json")]
    with pytest.raises(RegistryError, match="holds no files"):
        oci.pull(artifact(tmp_path, layers), tmp_path / "back")
    layers.append(titled(b"1", "text/plain", org__opencontainers__image__title="a"))
    assert files(oci.pull(artifact(tmp_path, layers), tmp_path / "back")) == {"a": b"1"}
