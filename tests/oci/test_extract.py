"""Archives: hostile ones are refused, damaged ones named, layers laid on top of each other."""

import contextlib
import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import CapacityError, Failure, RegistryError
from runtime.oci.extract import Unpacker, zstd
from tests.oci.conftest import archive, files, needs, special


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


HOSTILE = [
    "absolute", "dots", "absolute link", "link up", "link through a link", "file through a link",
    "absolute hard link", "hard link to nothing", "hard link up", "character", "block", "pipe",
]  # fmt: skip


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
