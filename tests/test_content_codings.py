"""Content codings: bodies that servers compressed though nobody asked."""

import gzip
import zlib
from pathlib import Path

import pytest
from backports import zstd

from runtime.content_codings import decode, names
from runtime.errors import DataError

TEXT = b'{"text": "row"}\n' * 200_000


def bare_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return encoder.compress(data) + encoder.flush()


CODED = {
    "gzip": gzip.compress(TEXT),
    "GZIP , identity": gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:]),
    "x-gzip": gzip.compress(TEXT),
    "deflate": zlib.compress(TEXT),
    " deflate": bare_deflate(TEXT),
    "zstd": zstd.compress(TEXT),
    "zstd, gzip": gzip.compress(zstd.compress(TEXT)),
    "": TEXT,
    "identity": TEXT,
}


def decoded(tmp_path: Path, header: str, data: bytes) -> tuple[bytes, int]:
    (tmp_path / "coded").write_bytes(data)
    counted: list[int] = []
    decode(tmp_path / "coded", tmp_path / "plain", names(header), counted.append)
    return (tmp_path / "plain").read_bytes(), sum(counted)


@pytest.mark.parametrize("header", CODED)
def test_codings_are_taken_off_in_reverse(tmp_path: Path, header: str) -> None:
    assert decoded(tmp_path, header, CODED[header]) == (TEXT, len(TEXT))


@pytest.mark.parametrize("header", ["gzip", "deflate", " deflate", "zstd", "zstd, gzip"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_what_is_not_in_its_coding_is_one_error(tmp_path: Path, header: str, damage: str) -> None:
    data = CODED[header][:-20] if damage == "cut" else b"{}" * 500
    with pytest.raises(DataError, match="that its Content-Encoding says it is"):
        decoded(tmp_path, header, data)


@pytest.mark.parametrize("header", ["br", "compress", "gzip, br", ", ".join(["gzip"] * 5)])
def test_other_codings_are_refused_by_name(header: str) -> None:
    with pytest.raises(DataError, match=rf"in the coding '{header}'.*only gzip, deflate, zstd"):
        names(header)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_bomb_is_stopped_by_whoever_counts(tmp_path: Path, coding: str) -> None:
    zeros = bytes(64 << 20)
    bombs = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}
    (tmp_path / "coded").write_bytes(bombs[coding](zeros))
    sizes: list[int] = []

    def count(size: int) -> None:
        sizes.append(size)
        if sum(sizes) > 4 << 20:
            raise DataError("too much")

    with pytest.raises(DataError, match="too much"):
        decode(tmp_path / "coded", tmp_path / "plain", (coding,), count)
    assert max(sizes) <= 1 << 20
    assert (tmp_path / "plain").stat().st_size <= 4 << 20
