"""Reads the entries of a tar archive from an untrusted stream: names, kinds, and where the content lies.

Takes ustar, pax and GNU's long names; refuses sparse files, whose size is a claim and no bytes. Own code,
since tarfile takes a broken header for the end and a pax header of any size (docs/decisions/037). Writes
nothing. Start at `entries`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from runtime.oci.decompression import DamagedArchiveError, PlainStream

BLOCK_BYTES = 512

EntryKind = Literal["file", "folder", "link", "hard link", "device"]

_MOST_HEADER_BYTES = 1 << 20
"""Of all that precedes one entry: Go's archive/tar takes as much of each."""
_MOST_NUMBER = 1 << 62
_KINDS: dict[bytes, EntryKind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hard link", b"2": "link", b"3": "device",
    b"4": "device", b"5": "folder", b"6": "device",
}  # fmt: skip
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=\0]+)=")


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One entry; `device` stands for pipes and sockets too."""

    name: str
    kind: EntryKind
    size: int = 0
    offset: int = 0
    """Of the content in the unpacked stream."""
    executable: bool = False
    target: str = ""
    """Of a link as written; of a hard link, the name of another entry."""


def entries(stream: PlainStream) -> Iterator[TarEntry]:
    """Yield the entries of the archive that begins at the stream's position, up to its end.

    Raises DamagedArchiveError for what the format does not allow, sparse files and unknown kinds included.
    """
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    while (header := _header(stream)) is not None:
        kind, size = header[156:157], _number(header[124:136])
        if kind in b"xgLK":
            data = _extension(stream, size)
            if kind == b"x":
                own |= _records(data)
            elif kind == b"g":
                shared |= _records(data)
            else:
                own["path" if kind == b"L" else "linkpath"] = _text(data.partition(b"\0")[0])
            if sum(map(len, (*own.values(), *shared.values()))) > _MOST_HEADER_BYTES:
                raise DamagedArchiveError(f"more than {_MOST_HEADER_BYTES} bytes of header before an entry")
            continue
        entry = _entry(header, {**shared, **own}, stream.position)
        own = {}
        yield entry
        if entry.kind == "file":
            stream.skip_to(entry.offset + entry.size)
            stream.read(-entry.size % BLOCK_BYTES)  # some writers (umoci) leave the last block unfilled


def _header(stream: PlainStream) -> bytes | None:
    """Return the next header block, None at the end of the archive."""
    block = stream.read(BLOCK_BYTES)
    if not block.strip(b"\0"):
        return None
    if len(block) < BLOCK_BYTES:
        raise DamagedArchiveError("it ends in the middle of a header")
    stated = _OCTAL.fullmatch(block[148:156])
    summed = block[:148] + b" " * 8 + block[156:]
    if stated is None or int(stated[1] or b"0", 8) not in _sums(summed):
        raise DamagedArchiveError("a header's checksum is wrong")
    return block


def _sums(block: bytes) -> Iterator[int]:
    """Yield the sum of the bytes, and that of old writers, who took them for signed."""
    yield sum(block)
    yield sum(block) - 256 * sum(byte > 0x7F for byte in block)


def _extension(stream: PlainStream, size: int) -> bytes:
    """Return the content of a header that describes the next entry."""
    if size > _MOST_HEADER_BYTES:
        raise DamagedArchiveError(f"a header of {size} bytes, expected at most {_MOST_HEADER_BYTES}")
    data = stream.read(size)
    stream.skip_to(stream.position + -size % BLOCK_BYTES)
    if len(data) < size:
        raise DamagedArchiveError("it ends in the middle of a header")
    return data


def _entry(header: bytes, extended: dict[str, str], offset: int) -> TarEntry:
    name = extended.get("path") or _ustar_name(header)
    if header[156:157] == b"S" or any(key.startswith("GNU.sparse.") for key in extended):
        raise DamagedArchiveError(f"entry {name!r} is a sparse file, expected its bytes as they are")
    kind = _KINDS.get(header[156:157])
    if kind is None:
        raise DamagedArchiveError(f"entry {name!r} is of an unknown kind {header[156:157]!r}")
    if kind == "file" and name.endswith("/"):  # how the oldest archives name a folder
        kind = "folder"
    size = _number(header[124:136])
    if "size" in extended:
        if not re.fullmatch("[0-9]{1,19}", extended["size"]):
            raise DamagedArchiveError(f"entry {name!r} has the size {extended['size'][:20]!r}")
        size = int(extended["size"])
    if size > _MOST_NUMBER:
        raise DamagedArchiveError(f"entry {name!r} has the size {size}")
    return TarEntry(
        name,
        kind,
        size=size if kind == "file" else 0,
        offset=offset,
        executable=bool(_number(header[100:108]) & 0o111),
        target=extended.get("linkpath") or _text(_field(header, 157, 100)),
    )


def _ustar_name(header: bytes) -> str:
    name = _field(header, 0, 100)
    prefix = _field(header, 345, 155) if header[257:263] == b"ustar\0" else b""  # GNU has times there
    return _text(prefix + b"/" + name if prefix else name)


def _records(data: bytes) -> dict[str, str]:
    """Return the pax records `LENGTH KEY=VALUE\\n` of a header that matter here."""
    found: dict[str, str] = {}
    start = 0
    while start < len(data) and data[start]:
        match = _RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or end < match.end() + 1 or data[end - 1 : end] != b"\n":
            raise DamagedArchiveError("a pax header is malformed")
        key, value = _text(match[2]), _text(data[match.end() : end - 1])
        if key in {"path", "linkpath", "size"} or key.startswith("GNU.sparse."):
            if "\0" in value:
                raise DamagedArchiveError(f"a pax header has a NUL in its {key}")
            found[key] = value
        start = end
    return found


def _number(field: bytes) -> int:
    """Return a number in octal digits or, with the first bit set, in binary (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40 or value > _MOST_NUMBER:
            raise DamagedArchiveError("a header has a negative or impossible number")
        return value
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise DamagedArchiveError(f"a header has {field!r} for a number")
    return int(match[1] or b"0", 8)


def _field(header: bytes, start: int, size: int) -> bytes:
    return header[start : start + size].partition(b"\0")[0]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
