"""Foreign images and artifacts (fault test 37), and archives that mean harm."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from oci.conftest import Started, fresh, quick
from oci.test_layout import files, needs
from runtime import oci
from runtime.errors import CapacityError, Failure, RegistryError
from runtime.oci import modelpack
from runtime.oci.blobs import Blob, BlobParts, from_bytes
from runtime.oci.extract import Unpacker, zstd
from runtime.oci.image import CONFIG, LAYER_GZIP, LAYER_TAR, assemble, build
from runtime.oci.images import load_base

IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"


def archive(*entries: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def store(tmp_path: Path, layers: list[Blob], config: dict[str, object] | None = None) -> oci.Reference:
    """Put an image of these layers into a layout."""
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    blob = from_bytes(json.dumps(config or {}).encode(), CONFIG)
    oci.push_image(lambda: assemble(layers, blob, annotations={}), reference)
    return reference


def titled(data: bytes, media_type: str, **notes: str) -> BlobParts:
    blob = from_bytes(data, media_type)
    blob.descriptor.annotations.update({key.replace("__", "."): value for key, value in notes.items()})
    return blob


def unpack(tmp_path: Path, *layers: bytes, root: str = "data") -> Path:
    target = tmp_path / "target"
    target.mkdir()
    unpacker = Unpacker(target, root=root)
    for number, layer in enumerate(layers):
        path = tmp_path / f"layer{number}"
        path.write_bytes(layer)
        unpacker.unpack(path)
    unpacker.finish()
    return target


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


HOSTILE = ["absolute", "dots", "absolute link", "link up", "link through a link", "file through a link"]
HOSTILE += ["absolute hard link", "hard link to nothing", "hard link up", "character", "block", "pipe"]


@pytest.mark.parametrize(
    "entries",
    [
        [("/data/x", b"")],
        [("data/../../x", b"")],
        [special("data/x", tarfile.SYMTYPE, "/etc/passwd")],
        [special("data/x", tarfile.SYMTYPE, "../../etc")],
        [special("data/a", tarfile.SYMTYPE, "."), special("data/b", tarfile.SYMTYPE, "a/../..")],
        [special("data/d", tarfile.SYMTYPE, ".."), ("data/d/x", b"owned")],
        [special("data/x", tarfile.LNKTYPE, "/etc/passwd")],
        [special("data/x", tarfile.LNKTYPE, "etc/passwd")],
        [special("data/x", tarfile.LNKTYPE, "data/../../etc/passwd")],
        [special("data/x", tarfile.CHRTYPE)],
        [special("data/x", tarfile.BLKTYPE)],
        [special("data/x", tarfile.FIFOTYPE)],
    ],
    ids=HOSTILE,
)
def test_hostile_entry_is_refused_and_nothing_is_written_outside(
    tmp_path: Path, entries: list[tarfile.TarInfo | tuple[str, bytes]]
) -> None:
    with pytest.raises(RegistryError, match=r"refused|device or pipe|outside|out of"):
        unpack(tmp_path, archive(*entries))
    assert {path.name for path in tmp_path.iterdir()} == {"target", "layer0"}


def test_links_inside_are_kept_and_hard_links_become_files(tmp_path: Path) -> None:
    target = unpack(
        tmp_path,
        archive(
            ("data/blobs/one", b"1"),
            special("data/snap/model", tarfile.SYMTYPE, "../blobs/one"),
            special("data/hard", tarfile.LNKTYPE, "data/blobs/one"),
        ),
    )
    assert (target / "snap/model").read_bytes() == b"1"
    assert (target / "hard").read_bytes() == b"1"


def test_later_layers_replace_and_remove(tmp_path: Path) -> None:
    target = unpack(
        tmp_path,
        archive(("data/a", b"1"), ("data/b", b"1"), ("data/c/d", b"1"), ("data/e/f", b"1")),
        archive(("data/a", b"2"), ("data/.wh.b", b""), ("data/c/.wh..wh..opq", b""), ("data/e", b"file")),
    )
    assert files(target) == {"a": b"2", "e": b"file"}


@pytest.mark.parametrize("name", ["data/.wh...", "data/x/.wh...", "data/.wh."])
def test_whiteout_never_removes_what_is_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("x")
    with contextlib.suppress(Failure):
        unpack(tmp_path, archive(("data/a", b"1"), (name, b"")))
    assert (tmp_path / "precious").exists()
    assert (tmp_path / "target").exists()


@pytest.mark.system
@needs("skopeo")
def test_layers_that_a_tool_recompressed_with_zstd_are_read(adapter: Path, tmp_path: Path) -> None:
    oci.push(adapter, oci.parse(f"oci:{tmp_path}/plain:v1"))
    subprocess.run(
        ["skopeo", "copy", "-q", "--dest-compress", "--dest-compress-format", "zstd",
         f"oci:{tmp_path}/plain:v1", f"oci:{tmp_path}/packed:v1"], check=True,
    )  # fmt: skip
    packed = oci.parse(f"oci:{tmp_path}/packed:v1")
    assert {layer.media_type.rpartition("+")[2] for layer in oci.inspect(packed).manifest.layers} == {"zstd"}
    pulled = oci.pull(packed, tmp_path / "pulled")
    for file in (path for path in adapter.rglob("*") if path.is_file()):
        assert (pulled / file.relative_to(adapter)).read_bytes() == file.read_bytes()


def test_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    plain = io.BytesIO()
    info = tarfile.TarInfo("data/zeros")
    info.size = 600 << 20
    plain.write(info.tobuf())
    bomb = tmp_path / "bomb"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(plain.getvalue())
        for _ in range(600):
            file.write(bytes(1 << 20))
    assert bomb.stat().st_size < 4 << 20
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(CapacityError, match="bomb"):
        Unpacker(target, root="data").unpack(bomb)
    assert sum(p.stat().st_size for p in target.rglob("*")) < 450 << 20


@pytest.mark.parametrize("data", [b"not a tar" * 100, b"\x1f\x8b\x08rubbish", b"\x28\xb5\x2f\xfdrest"])
def test_layer_that_is_no_archive_is_an_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(RegistryError, match="not a readable tar"):
        unpack(tmp_path, data)


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
def test_truncated_layer_is_an_error(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(archive(("data/a", os.urandom(100_000))))
    with pytest.raises(RegistryError, match="not a readable tar"):
        unpack(tmp_path, whole[: len(whole) // 2])


@pytest.mark.system
@needs("umoci", "skopeo")
def test_files_on_a_base_image_serve_old_controllers(
    open_registry: Started, adapter: Path, tmp_path: Path
) -> None:
    """The base's files, its config and its layers stay; the base's layers are mounted, not sent again."""
    base, target = fresh(open_registry.host, "busybox"), fresh(open_registry.host, "adapter")
    rootfs = tmp_path / "rootfs"
    (rootfs / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", rootfs / "bin/sh")
    umoci = ["umoci", "--log=error"]
    subprocess.run([*umoci, "init", "--layout", tmp_path / "base"], check=True)
    subprocess.run([*umoci, "new", "--image", f"{tmp_path}/base:v1"], check=True)
    subprocess.run([*umoci, "insert", "--image", f"{tmp_path}/base:v1", rootfs / "bin", "/bin"], check=True)
    subprocess.run([*umoci, "config", "--image", f"{tmp_path}/base:v1", "--config.env=A=b"], check=True)
    copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{tmp_path}/base:v1", f"docker://{base}"]
    subprocess.run(copy, check=True)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    image = build(adapter, scratch, base=load_base(base, scratch, quick()))
    oci.push_image(lambda: image, target, access=quick(), mount_from=base.repository)

    inspect = ["skopeo", "inspect", "--tls-verify=false", "--config", f"docker://{target}"]
    config = json.loads(subprocess.check_output(inspect))
    assert config["config"]["Env"] == ["A=b"]
    assert len(config["rootfs"]["diff_ids"]) == 3
    assert oci.inspect(target, quick()).manifest.annotations["org.opencontainers.image.base.name"] == str(
        base
    )
    copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{target}", f"oci:{tmp_path}/out:v1"]
    subprocess.run(copy, check=True)
    unpacked = tmp_path / "bundle"
    subprocess.run([*umoci, "unpack", "--rootless", "--image", f"{tmp_path}/out:v1", unpacked], check=True)
    assert (unpacked / "rootfs/bin/sh").is_file()
    assert files(unpacked / "rootfs/data") == files(adapter)
    assert files(oci.pull(target, tmp_path / "back", access=quick())) == files(adapter)
