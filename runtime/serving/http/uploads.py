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
PARTS = 1024
"""Members of gzip or frames of zstd that one body may consist of: each costs a decompressor."""


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
        decompression = Decompression(coding) if coding else None
        received_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client closed the connection within its request")
            data, more = message.get("body", b""), message.get("more_body", False)
            received_bytes += len(data)
            if received_bytes > self._body_bytes:
                raise self._too_large()
            room = self._body_bytes - len(body) + 1
            plain = data if decompression is None else decompression.feed(data, room)
            body += plain
            self._arriving_bytes += len(plain)
            if len(body) > self._body_bytes:
                raise self._too_large()
            if self._arriving_bytes > self._bodies_bytes:
                raise OverloadedError("too many request bodies are arriving at once; try again shortly")
        if decompression is not None:
            decompression.end()

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than the {self._body_bytes} bytes this server accepts")


def _coding(headers: Mapping[str, str]) -> str:
    """Return the name of a body's compression, empty for none."""
    named = headers.get("content-encoding", "").strip().lower()
    return {"identity": "", "x-gzip": "gzip"}.get(named, named)


class Decompression:
    """One body's: of one part, or of several after each other (gzip: RFC 1952, zstd: RFC 8878)."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._decoder: Decoder | None = None
        self._parts = 0

    def feed(self, data: bytes, most: int) -> bytearray:
        """Return `most` bytes, or fewer when all of `data` is used; RequestError when it is damaged."""
        plain = bytearray()
        while data and len(plain) < most:
            if self._decoder is None or self._decoder.eof:
                self._decoder = self._next_part(data)
            try:
                plain += self._decoder.decompress(data, most - len(plain))
            except Exception:  # each decoder raises its own kinds
                window = " with a window of at most 8 MiB" if self._coding == "zstd" else ""
                raise RequestError(
                    f"the body is not valid {self._coding}{window}, which its Content-Encoding says it is"
                ) from None
            data = self._decoder.unused_data
        return plain

    def end(self) -> None:
        """Raise RequestError where the data is not whole."""
        if self._decoder is not None and not self._decoder.eof:
            raise RequestError(f"the body ends within its {self._coding} data; send all of it")

    def _next_part(self, data: bytes) -> Decoder:
        self._parts += 1
        if self._parts > 1 and self._coding == "deflate":
            raise RequestError("the body has further bytes after its deflate data; send one stream")
        if self._parts > PARTS:
            raise RequestError(
                f"the body has more than {PARTS} parts of {self._coding} data; send larger ones"
            )
        if self._coding == "zstd":
            return zstd.ZstdDecompressor(
                options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
            )
        if self._coding == "gzip":
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        # "deflate" is zlib's format, whose first byte ends in 8; some clients send the bare data instead.
        return zlib.decompressobj(zlib.MAX_WBITS if data[0] & 15 == 8 else -zlib.MAX_WBITS)
