"""Reads request bodies within limits: size, time, compression, and the memory of all that arrive at once.

Nothing is kept beyond a limit: a body is counted, and decompressed, as it arrives. Does not know routes,
keys, or what a body means. Start at `Uploads.read`.
"""

import asyncio
import sys
import zlib
from collections.abc import Mapping
from typing import Protocol

from starlette.types import Receive

from runtime.errors import (
    ClientGoneError,
    ContentCodingError,
    DeadlineError,
    OverloadedError,
    RequestError,
    TooLargeError,
    one_line,
)
from runtime.serving.settings import Limits

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CODINGS = "gzip, deflate, zstd"
"""What Content-Encoding may name, as a value of Accept-Encoding."""

ZSTD_WINDOW_LOG = 23
"""8 MiB, the largest window that zstd may have as a content coding (RFC 9659)."""


class Decoder(Protocol):
    """What zlib's and zstd's decompressors have in common."""

    @property
    def eof(self) -> bool:
        """Whether the end of the compressed data was met."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What came after it."""
        ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Return at most `max_length` bytes; all of `data` is used when they are fewer."""
        ...


class Uploads:
    """Reads bodies, and counts the bytes of those that are still arriving."""

    def __init__(self, limits: Limits) -> None:
        self._body_bytes = limits.body_bytes
        self._bodies_bytes = limits.bodies_bytes
        self._timeout_s = limits.body_timeout_s
        self._arriving_bytes = 0

    def check(self, headers: Mapping[str, str]) -> None:
        """Refuse a body by what is declared of it: TooLargeError, ContentCodingError."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._body_bytes:
            raise self._too_large()
        coding = _coding(headers)
        if coding not in {"", "gzip", "deflate", "zstd"}:
            raise ContentCodingError(
                f"bodies with Content-Encoding '{coding[:80]}' are not read here, send {CODINGS} or none"
            )

    async def read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """Return a whole body, decompressed.

        Raises TooLargeError, DeadlineError, OverloadedError when too much is arriving from all clients
        together, ClientGoneError, and RequestError when it does not decompress.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read_into(body, _coding(headers), receive)
        except TimeoutError:
            raise DeadlineError(f"the body was not complete after {self._timeout_s:.0f} s") from None
        finally:
            self._arriving_bytes -= len(body)
        return bytes(body)

    async def _read_into(self, body: bytearray, coding: str, receive: Receive) -> None:
        decoder: Decoder | None = None
        received_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client closed the connection within its request")
            data, more = message.get("body", b""), message.get("more_body", False)
            received_bytes += len(data)
            if received_bytes > self._body_bytes:
                raise self._too_large()
            if coding and data:
                decoder = decoder or _decoder(coding, data)
                data = _decompress(decoder, coding, data, self._body_bytes - len(body) + 1)
            body += data
            self._arriving_bytes += len(data)
            if len(body) > self._body_bytes:
                raise self._too_large()
            if self._arriving_bytes > self._bodies_bytes:
                raise OverloadedError("too many request bodies are arriving at once; try again shortly")
        if decoder is not None and not decoder.eof:
            raise RequestError(f"the body ends within its {coding} data; send all of it")

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than the {self._body_bytes} bytes this server accepts")


def _coding(headers: Mapping[str, str]) -> str:
    """Return the name of a body's compression, empty for none."""
    named = headers.get("content-encoding", "").strip().lower()
    return {"identity": "", "x-gzip": "gzip"}.get(named, named)


def _decoder(coding: str, data: bytes) -> Decoder:
    if coding == "zstd":
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})
    if coding == "gzip":
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    # "deflate" is zlib's format, whose first byte ends in 8; some clients send the bare data instead.
    return zlib.decompressobj(zlib.MAX_WBITS if data[0] & 15 == 8 else -zlib.MAX_WBITS)


def _decompress(decoder: Decoder, coding: str, data: bytes, most: int) -> bytes:
    ended = decoder.eof
    try:
        plain = b"" if ended else decoder.decompress(data, most)
    except Exception as error:  # each decoder raises its own kinds
        raise RequestError(f"the body is not valid {coding}: {one_line(error)}") from None
    if ended or decoder.unused_data:
        raise RequestError(f"the body has further bytes after its {coding} data; send one stream")
    return plain
