"""Tar headers: what tarfile and GNU tar write is read alike, what is broken or hostile is named."""

import io
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import RegistryError
from runtime.oci.decompression import opened
from runtime.oci.tar import TarEntry, entries
from tests.oci.conftest import archive, needs, special

KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "hard link",
    tarfile.FIFOTYPE: "device",
    tarfile.CHRTYPE: "device",
}


def read(data: bytes, tmp_path: Path) -> list[TarEntry]:
    path = tmp_path / "layer"
    path.write_bytes(data)
    with opened(path, "sha256:x") as stream:
        return list(entries(stream))


name = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=80)
path_name = st.lists(name, min_size=1, max_size=5).map("/".join)
member = st.tuples(path_name, st.sampled_from(sorted(KINDS)), st.binary(max_size=1500), path_name)


@given(st.lists(member, max_size=6), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_what_tarfile_writes_is_read_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, bytes, str]], form: int
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8") as made:
        for text, kind, content, target in members:
            info = special(text, kind, target if kind in {tarfile.SYMTYPE, tarfile.LNKTYPE} else "")
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            made.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    found = read(data, tmp_path_factory.mktemp("tar"))
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archived:
        expected = archived.getmembers()
    assert [(e.name.rstrip("/"), e.kind, e.size, e.target) for e in found] == [
        (i.name, KINDS[i.type], i.size, i.linkname) for i in expected
    ]
    contents = [data[e.offset : e.offset + e.size] for e in found if e.kind == "file"]
    assert contents == [content for _, kind, content, _ in members if kind == tarfile.REGTYPE]


@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "pax"])
@pytest.mark.system
@needs("tar")
def test_what_gnu_tar_writes_is_read(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    deep = folder / "data" / ("d" * 60 if form != "v7" else "d")
    deep.mkdir(parents=True)
    (deep / "weights").write_bytes(b"w" * 1000)
    (deep / "run.sh").write_text("#!/bin/sh\n")
    (deep / "run.sh").chmod(0o755)
    (deep / "link").symlink_to("weights")
    (deep / "hard").hardlink_to(deep / "weights")
    made = subprocess.run(["tar", f"--format={form}", "--sort=name", "-C", folder, "-c", "."],
                          check=True, capture_output=True)  # fmt: skip
    found = {e.name.rpartition("/")[2]: e for e in read(made.stdout, tmp_path) if e.kind != "folder"}
    assert {name: e.kind for name, e in found.items()} == {
        "hard": "file", "link": "link", "run.sh": "file", "weights": "hard link",
    }  # fmt: skip
    assert (found["run.sh"].executable, found["hard"].executable) == (True, False)
    assert made.stdout[found["hard"].offset :][: found["hard"].size] == b"w" * 1000


def header(kind: bytes, size: int, name: str = "data/a", form: int = tarfile.USTAR_FORMAT) -> bytes:
    info = special(name, kind)
    info.size = size
    return info.tobuf(form)


def pax(*records: tuple[bytes, bytes], content: bytes = b"", kind: bytes = tarfile.XHDTYPE) -> bytes:
    data = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        while len(b"%d" % length) + len(key) + len(value) + 3 != length:
            length = len(b"%d" % length) + len(key) + len(value) + 3
        data += b"%d %s=%s\n" % (length, key, value)
    return raw_pax(data, content, kind)


def raw_pax(data: bytes, content: bytes = b"", kind: bytes = tarfile.XHDTYPE) -> bytes:
    padded = data + bytes(-len(data) % 512)
    return header(kind, len(data)) + padded + header(b"0", len(content)) + content + bytes(1024)


def old_sparse(claimed: int) -> bytes:
    made = bytearray(header(tarfile.GNUTYPE_SPARSE, 512, form=tarfile.GNU_FORMAT))
    made[386:410] = b"%011o\0%011o\0" % (0, 512)
    made[483:495] = b"%011o\0" % claimed
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made) + b"x" * 512 + bytes(1024)


def wrong_checksum() -> bytes:
    first, second = archive(("data/a", b"1")), bytearray(header(b"0", 0))
    second[0] ^= 1
    return first[:1024] + bytes(second) + bytes(1024)


BROKEN = {
    "gnu sparse": (old_sparse(1500 << 20), "sparse"),
    "pax sparse 1.0": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9999999999")), "sparse",
    ),
    "pax sparse 0.1": (pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"999999999")), "sparse"),
    "chain of pax headers": (
        pax((b"path", b"d" * 90_000)) [:-2048] * 30 + bytes(1024), "header",
    ),
    "pax header of 200 MB": (header(tarfile.XHDTYPE, 200 << 20), "header of 209715200 bytes"),
    "long name of 2 GB": (header(tarfile.GNUTYPE_LONGNAME, 2 << 30), "header of 2147483648 bytes"),
    "NUL in a path": (pax((b"path", b"data/a\0b")), "NUL"),
    "negative size": (pax((b"size", b"-5")), "the size '-5'"),
    "huge size": (pax((b"size", b"9" * 30)), "the size '9999"),
    "size that is no number": (pax((b"size", b"nan")), "the size 'nan'"),
    "size beyond the end": (pax((b"size", b"4096")), "ends in the middle of a file"),
    "garbage record": (raw_pax(b"zzz path=\n"), "malformed"),
    "record of no length": (raw_pax(b"0 path=a\n"), "malformed"),
    "record beyond its header": (raw_pax(b"99999 path=a\n"), "malformed"),
    "record of digits": (raw_pax(b"1" * 900_000), "malformed"),
    "unknown kind": (header(b"Z", 0), "unknown kind"),
    "broken header after a file": (wrong_checksum(), "checksum"),
    "half a header": (archive(("data/a", b"1"))[:1024] + header(b"0", 0)[:300], "middle of a header"),
    "half a file": (archive(("data/a", bytes(5000)))[:3000], "middle of a file"),
    "text": (b"not a tar" * 100, "checksum"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_archive_is_one_readable_line(tmp_path: Path, what: str) -> None:
    data, message = BROKEN[what]
    with pytest.raises(RegistryError, match=message) as caught:
        read(data, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_thousands_of_headers_before_one_entry_take_no_recursion(tmp_path: Path) -> None:
    one = pax((b"path", b"data/a"))[:-1536]
    longname = header(tarfile.GNUTYPE_LONGNAME, 7) + b"data/b\0".ljust(512, b"\0")
    data = one * 3000 + longname * 3000 + header(b"0", 0) + bytes(1024)
    assert [e.name for e in read(data, tmp_path)] == ["data/b"]


def test_headers_that_are_skipped_take_no_memory(tmp_path: Path) -> None:
    one = pax((b"comment", b"c" * 900_000))[:-1536]
    path = tmp_path / "layer"
    path.write_bytes(one * 40 + header(b"0", 0) + bytes(1024))
    tracemalloc.start()
    try:
        with opened(path, "sha256:x") as stream:
            assert len(list(entries(stream))) == 1
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", [0, 512, 700, 1024])
def test_an_archive_may_end_without_its_padding(tmp_path: Path, end: int) -> None:
    """Umoci leaves the last block unfilled, others leave the end blocks out."""
    data = archive(("data/a", b"123"))
    cut = data[: 512 + 3] if not end else data[:1024] + bytes(end - 512)
    assert [e.size for e in read(cut, tmp_path)] == [3]


def mutations(data: bytes) -> Iterator[bytes]:
    for place in range(0, 1024, 7):
        yield data[:place] + bytes([data[place] ^ 0x5A]) + data[place + 1 :]


def test_any_flipped_byte_of_a_header_gives_entries_or_one_error(tmp_path: Path) -> None:
    outcomes = set()
    for data in mutations(pax((b"path", b"data/x"), content=b"")):
        try:
            outcomes.add(len(read(data, tmp_path)))
        except RegistryError:
            outcomes.add(-1)
    assert outcomes <= {-1, 0, 1}
    assert -1 in outcomes
