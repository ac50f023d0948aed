"""Blobs as streams of plain bytes: gzip, zstd and none are read, broken ones are one error, bombs end."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import RegistryError
from runtime.oci.decompression import ALWAYS_ALLOWED_BYTES, opened, zstd

PACKERS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "gzip of several members": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "gzip with padding": lambda data: gzip.compress(data) + bytes(512),
    "zstd": zstd.compress,
    "zstd of several frames": lambda data: zstd.compress(data[:700]) + zstd.compress(data[700:]),
    "zstd with a table of contents": lambda data: zstd.compress(data) + b"\x50\x2a\x4d\x18\x04\0\0\0tocs",
}  # fmt: skip


@pytest.mark.parametrize("packer", PACKERS)
def test_a_stream_is_read_forwards_and_hashed_whole(tmp_path: Path, packer: str) -> None:
    data = os.urandom(3_000_000)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    (tmp_path / "blob").write_bytes(PACKERS[packer](data))
    with opened(tmp_path / "blob", digest) as stream:
        assert stream.read(10) == data[:10]
        stream.skip_to(1_500_000)
        assert (stream.read(5), stream.position) == (data[1_500_000:1_500_005], 1_500_005)
        stream.skip_to(2_999_999)
        assert stream.read(100) == data[-1:]
        assert stream.read(100) == b""
        assert stream.digest() == digest


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
@pytest.mark.parametrize("fault", ["cut", "flipped", "rest", "rubbish"])
def test_a_truncated_or_damaged_blob_is_an_error(
    tmp_path: Path, compress: Callable[[bytes], bytes], fault: str
) -> None:
    whole = compress(os.urandom(100_000))
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:4] + bytes([whole[4] ^ 0xFF]) + whole[5:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        "rest": whole + b"rest",
        "rubbish": whole[:12] + b"rubbish" * 100,
    }
    (tmp_path / "blob").write_bytes(damaged[fault])
    with (
        pytest.raises(RegistryError, match="layer sha256:x: not a readable tar") as caught,
        opened(tmp_path / "blob", "sha256:x") as stream,
    ):
        stream.digest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [("bzip2", bz2.compress(bytes(9))), ("xz", lzma.compress(bytes(9))), ("zip", b"PK\x03\x04" + bytes(9))],
    ids=["bzip2", "xz", "zip"],
)  # fmt: skip
def test_another_compression_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "blob").write_bytes(data)
    with pytest.raises(RegistryError, match=f"{name}, not a readable tar"), opened(tmp_path / "blob", "x"):
        raise ValueError("what a reader finds")


def test_a_zstd_frame_that_wants_gigabytes_of_window_is_refused(tmp_path: Path) -> None:
    window = {
        zstd.CompressionParameter.window_log: 30,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    packer = zstd.ZstdCompressor(options=window)
    (tmp_path / "blob").write_bytes(packer.compress(bytes(1000)) + packer.flush())
    with pytest.raises(RegistryError, match="not a readable"), opened(tmp_path / "blob", "x") as stream:
        stream.digest()


@pytest.mark.parametrize("way", ["skip", "read", "digest"])
def test_a_bomb_is_refused_without_unpacking_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("runtime.oci.decompression.ALWAYS_ALLOWED_BYTES", 1 << 20)
    assert ALWAYS_ALLOWED_BYTES == 256 << 20
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    (tmp_path / "blob").write_bytes(buffer.getvalue())
    with pytest.raises(RegistryError, match="bomb"), opened(tmp_path / "blob", "x") as stream:
        if way == "skip":
            stream.skip_to(1 << 60)
        elif way == "digest":
            stream.digest()
        while way == "read":
            stream.read(1 << 20)
            assert stream.position < 40 << 20


def test_an_error_of_the_disk_is_not_the_blobs(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    with pytest.raises(IsADirectoryError), opened(tmp_path / "blob", "x"):
        tmp_path.read_bytes()
