"""Bodies in pieces, compressed and too many at once, read from a scripted client."""

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
from backports import zstd
from starlette.types import Message, Receive

from runtime.errors import ContentCodingError, DeadlineError, OverloadedError, RequestError, TooLargeError
from runtime.serving.http.uploads import Uploads
from runtime.serving.settings import Limits

pytestmark = pytest.mark.anyio

TEXT = b'{"prompt": "hello hello hello"}'
BARE = zlib.compressobj(wbits=-zlib.MAX_WBITS)
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
"""A frame of zstd that says nothing."""
COMPRESSED = [
    ("gzip", gzip.compress(TEXT)),
    ("X-Gzip", gzip.compress(TEXT)),
    ("deflate", zlib.compress(TEXT)),
    ("deflate", BARE.compress(TEXT) + BARE.flush()),
    ("zstd", zstd.compress(TEXT)),
    ("identity", TEXT),
    ("gzip", gzip.compress(TEXT[:9]) + gzip.compress(b"") + gzip.compress(TEXT[9:])),  # RFC 1952, 2.2
    ("zstd", zstd.compress(TEXT[:9]) + SKIPPABLE + zstd.compress(TEXT[9:])),  # RFC 8878, 3.1
]


def parts(chunks: Iterable[bytes], *, ends: bool = True) -> Receive:
    """Return a `receive` that gives the chunks, and then the end of the body, or nothing any more."""
    waiting = iter(chunks)

    async def receive() -> Message:
        for chunk in waiting:
            return {"type": "http.request", "body": chunk, "more_body": True}
        if not ends:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive


async def read(chunks: Iterable[bytes], coding: str = "", **limits: Any) -> bytes:
    headers = {"content-encoding": coding} if coding else {}
    uploads = Uploads(Limits(**limits))
    uploads.check(headers)
    return await uploads.read(headers, parts(chunks))


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(("coding", "data"), COMPRESSED)
async def test_compressed_body_is_read_in_pieces_of_any_size(coding: str, data: bytes, piece: int) -> None:
    chunks = [data[start : start + piece] for start in range(0, len(data), piece)]
    assert await read(chunks, coding) == TEXT


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "compress", "\x00" * 5000])
async def test_other_codings_are_refused_by_name(coding: str) -> None:
    with pytest.raises(ContentCodingError, match="gzip, deflate, zstd"):
        await read([b"x"], coding)


@pytest.mark.parametrize(
    ("coding", "bomb"),
    [
        ("gzip", gzip.compress(bytes(200 << 20))),
        ("deflate", zlib.compress(bytes(200 << 20))),
        ("zstd", zstd.compress(bytes(200 << 20))),
    ],
)
async def test_a_bomb_stops_at_the_limit(coding: str, bomb: bytes) -> None:
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match="1048576"):
            await read([bomb], coding, body_bytes=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


async def test_blocks_of_nothing_count_as_sent() -> None:
    nothing = b"\x00\x00\x00\xff\xff"  # a stored block without a byte
    with pytest.raises(TooLargeError):
        await read([zlib.compress(b"x")[:2], *[nothing * 100] * 10], "deflate", body_bytes=2048)


@pytest.mark.parametrize(
    ("coding", "data", "message"),
    [
        ("gzip", b"{}", "not valid gzip"),
        ("deflate", b"\xff\xff", "not valid deflate"),
        ("zstd", gzip.compress(TEXT), "not valid zstd"),
        ("gzip", gzip.compress(TEXT)[:-3], "ends within its gzip data"),
        ("zstd", zstd.compress(TEXT)[:-3], "ends within its zstd data"),
        ("gzip", gzip.compress(TEXT) + b"{}", "not valid gzip"),
        ("gzip", gzip.compress(TEXT) + gzip.compress(TEXT)[:-3], "ends within its gzip data"),
        ("zstd", zstd.compress(TEXT) + b"{}{}{}{}", "not valid zstd"),
        ("zstd", zstd.compress(TEXT) + zstd.compress(TEXT)[:-3], "ends within its zstd data"),
        ("deflate", zlib.compress(TEXT) * 2, "further bytes after its deflate data"),
        ("gzip", gzip.compress(b"") * 2000, "more than 1024 parts of gzip data"),
        ("zstd", zstd.compress(b"") * 2000, "more than 1024 parts of zstd data"),
        ("zstd", b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(9), "not valid zstd"),  # wants a window of 2 GiB
    ],
)
async def test_damaged_data_is_a_refusal(coding: str, data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        await read([data], coding)
    assert "Error" not in str(refused.value)
    assert "decompress" not in str(refused.value)
    with pytest.raises(RequestError, match=message):
        await read([data[start : start + 1] for start in range(len(data))], coding)


async def test_bodies_that_arrive_together_share_a_budget_and_give_it_back() -> None:
    uploads = Uploads(Limits(body_bytes=1024, bodies_bytes=4096))
    slow = [asyncio.create_task(uploads.read({}, parts([bytes(1000)], ends=False))) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="too many request bodies"):
        await uploads.read({}, parts([bytes(1000)]))
    for one in slow:
        one.cancel()
    await asyncio.wait(slow)
    assert await uploads.read({}, parts([bytes(1000)])) == bytes(1000)


async def test_body_that_does_not_end_is_late() -> None:
    uploads = Uploads(Limits(body_timeout_s=0.05))
    with pytest.raises(DeadlineError, match="not complete"):
        await uploads.read({}, parts([b"x"], ends=False))
