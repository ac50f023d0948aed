"""Layers to files: nothing is written before all is known, and then exactly what the image holds."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import CapacityError, Failure, RegistryError
from runtime.oci import extract
from runtime.oci.extract import LayerBlob, read_layer, write
from runtime.oci.selection import select
from runtime.oci.tree import ImageTree
from tests.oci.conftest import archive, files, needs, special


def unpack(tmp_path: Path, *layers: bytes) -> Path:
    target = tmp_path / "target"
    target.mkdir()
    tree, blobs = ImageTree(), []
    for number, layer in enumerate(layers):
        path = tmp_path / f"layer{number}"
        path.write_bytes(layer)
        blobs.append(LayerBlob(path, f"sha256:{hashlib.sha256(layer).hexdigest()}"))
        read_layer(tree, blobs[-1], number)
    write(select(tree, "data", "IMAGE"), blobs, target)
    return target


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_files_come_from_their_layers_with_their_modes(tmp_path: Path, compress: type[bytes]) -> None:
    script = tarfile.TarInfo("data/run.sh")
    script.mode = 0o4777
    target = unpack(
        tmp_path,
        compress(archive(("data/a", b"1"), ("data/gone", b"1"), ("data/sub/b", os.urandom(3_000_000)))),
        compress(archive(("data/a", b"22"), ("data/.wh.gone", b""), ("data/empty", b""), script)),
        compress(archive(link("data/l", "/data/sub/b"),
                         hard("data/h", "data/a"))),
    )  # fmt: skip
    found = files(target)
    assert set(found) == {"a", "empty", "h", "l", "run.sh", "sub/b"}
    assert (found["a"], found["h"], found["empty"]) == (b"22", b"22", b"")
    assert found["l"] == found["sub/b"]
    assert len(found["sub/b"]) == 3_000_000
    assert (target / "l").readlink() == Path("sub/b")
    assert {p.name: p.stat().st_mode & 0o7777 for p in target.iterdir() if p.is_file()} == {
        "a": 0o644, "h": 0o644, "empty": 0o644, "run.sh": 0o755, "l": 0o644,
    }  # fmt: skip


def link(name: str, target: str) -> tarfile.TarInfo:
    return special(name, tarfile.SYMTYPE, target)


def hard(name: str, target: str) -> tarfile.TarInfo:
    return special(name, tarfile.LNKTYPE, target)


HOSTILE: dict[str, list[tarfile.TarInfo | tuple[str, bytes]]] = {
    "dots": [("data/../../x", b"")],
    "absolute link": [link("data/x", "/etc/passwd")],
    "link up": [link("data/x", "../../etc")],
    "link through a link": [link("data/a", "."), link("data/b", "a/../..")],
    "file through a link": [link("data/d", ".."), ("data/d/x", b"owned")],
    "data is a link out": [link("data", "/etc"), ("data/x", b"owned"), ("data/../y", b"")],
    "absolute hard link": [hard("data/x", "/etc/passwd")],
    "hard link up": [hard("data/x", "data/../../etc/passwd")],
    "hard link to a link out": [link("data/l", "/etc/passwd"), hard("data/h", "data/l")],
    "character": [special("data/x", tarfile.CHRTYPE)],
    "block": [special("data/x", tarfile.BLKTYPE)],
    "pipe": [special("data/x", tarfile.FIFOTYPE)],
    "swapped folder": [("data/d/e/f", b"1"), link("data/l", "d/e/../../../ok"), link("data/d/e", "..")],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_entry_is_refused_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    with pytest.raises(RegistryError, match=r"refused|device or pipe"):
        unpack(tmp_path, archive(("data/first", b"1"), *HOSTILE[what]))
    assert {path.name for path in tmp_path.iterdir()} == {"target", "layer0"}
    assert not list((tmp_path / "target").iterdir())


def test_a_name_that_is_absolute_is_below_the_images_root(tmp_path: Path) -> None:
    """As some builders (kaniko) and every reader have it."""
    assert files(unpack(tmp_path, archive(("/data/x", b"1")))) == {"x": b"1"}


@pytest.mark.parametrize("name", ["data/.wh...", "data/x/.wh...", "data/.wh.", ".wh..", "data/.wh..wh..opq"])
def test_whiteout_never_removes_what_is_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("x")
    try:
        unpack(tmp_path, archive(("data/a", b"1"), (name, b"")))
    except Failure:
        assert not list((tmp_path / "target").iterdir())
    assert (tmp_path / "precious").exists()


def test_hard_links_count_as_often_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.oci.decompression.ALWAYS_ALLOWED_BYTES", 1 << 20)
    links = [hard(f"data/l{number}", "data/a") for number in range(40)]
    with pytest.raises(RegistryError, match="bomb"):
        unpack(tmp_path, gzip.compress(archive(("data/a", bytes(900_000)), *links)))
    assert not list((tmp_path / "target").iterdir())


def test_files_that_do_not_fit_are_known_before_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(CapacityError, match="2 bytes and 1 are free"):
        unpack(tmp_path, archive(("data/a", b"22")))
    assert not list((tmp_path / "target").iterdir())


def test_layer_that_unpacks_to_another_digest_is_refused(tmp_path: Path) -> None:
    plain = archive(("data/a", b"1"))
    for number, data in enumerate((plain, gzip.compress(plain))):
        path = tmp_path / str(number)
        path.write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        right = f"sha256:{hashlib.sha256(plain).hexdigest()}"
        read_layer(ImageTree(), LayerBlob(path, digest, right), 0)
        with pytest.raises(RegistryError, match="the image says"):
            read_layer(ImageTree(), LayerBlob(path, digest, "sha256:" + "0" * 64), 0)


@pytest.mark.system
@needs("skopeo")
@pytest.mark.parametrize("form", ["zstd", "gzip"])
def test_layers_that_a_tool_recompressed_are_read(adapter: Path, tmp_path: Path, form: str) -> None:
    oci.push(adapter, oci.parse(f"oci:{tmp_path}/plain:v1"))
    subprocess.run(
        ["skopeo", "copy", "-q", "--dest-compress", "--dest-compress-format", form,
         f"oci:{tmp_path}/plain:v1", f"oci:{tmp_path}/packed:v1"], check=True,
    )  # fmt: skip
    packed = oci.parse(f"oci:{tmp_path}/packed:v1")
    assert {layer.media_type.rpartition("+")[2] for layer in oci.inspect(packed).manifest.layers} == {form}
    assert files(oci.pull(packed, tmp_path / "pulled")) == files(adapter)


def test_a_name_that_the_file_system_refuses_is_one_line(tmp_path: Path) -> None:
    data = archive(("data/a\nb", b"1"))
    (tmp_path / "layer").write_bytes(data)
    (tmp_path / "target").mkdir()
    (tmp_path / "target/a\nb").touch()  # as on a file system that knows no second case
    tree, blob = ImageTree(), LayerBlob(tmp_path / "layer", f"sha256:{hashlib.sha256(data).hexdigest()}")
    read_layer(tree, blob, 0)
    with pytest.raises(Failure, match="not possible on the file system") as refused:
        write(select(tree, "data", "IMAGE"), [blob], tmp_path / "target")
    assert "\n" not in str(refused.value)
