"""Opens NaCl's secret boxes (XSalsa20 and Poly1305), in which cosign keeps its private keys.

Of NaCl only this much, for keys of a few hundred bytes: `cryptography` has Poly1305 and no Salsa20.
The cipher is that of https://cr.yp.to/snuffle/xsalsa-20110204.pdf. Start at `open_box`.
"""

import struct

_MASK = 0xFFFFFFFF
_CONSTANTS = struct.unpack("<4I", b"expand 32-byte k")
_COLUMNS = ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11))
_ROWS = ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
_TAG_BYTES, _BLOCK_BYTES, _KEY_BYTES = 16, 64, 32


def open_box(box: bytes, *, nonce: bytes, key: bytes) -> bytes | None:
    """Return what `box` holds for `key` (32 bytes) and `nonce` (24); None for another key's box."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.poly1305 import Poly1305

    tag, hidden = box[:_TAG_BYTES], box[_TAG_BYTES:]
    stream = _stream(key, nonce, _KEY_BYTES + len(hidden))
    try:
        Poly1305.verify_tag(stream[:_KEY_BYTES], hidden, tag)
    except (InvalidSignature, ValueError):
        return None
    return bytes(a ^ b for a, b in zip(hidden, stream[_KEY_BYTES:], strict=True))


def _stream(key: bytes, nonce: bytes, size: int) -> bytes:
    """Return the first `size` bytes of XSalsa20's key stream."""
    begun = _rounds(_state(key, nonce[:16]))
    below = struct.pack("<8I", *(begun[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))
    made = bytearray()
    for number in range(-(-size // _BLOCK_BYTES)):
        state = _state(below, nonce[16:] + number.to_bytes(8, "little"))
        mixed = zip(state, _rounds(state), strict=True)
        made += struct.pack("<16I", *((a + b) & _MASK for a, b in mixed))
    return bytes(made[:size])


def _state(key: bytes, place: bytes) -> list[int]:
    """Return Salsa20's 16 words for a key (32 bytes) and 16 bytes of nonce and counter."""
    c, k, n = _CONSTANTS, struct.unpack("<8I", key), struct.unpack("<4I", place)
    return [c[0], *k[:4], c[1], *n, c[2], *k[4:], c[3]]


def _rounds(state: list[int]) -> list[int]:
    """Return the words after 20 rounds, the input not added."""
    x = list(state)
    for _ in range(10):
        for a, b, c, d in _COLUMNS + _ROWS:
            x[b] ^= _rotated(x[a] + x[d], 7)
            x[c] ^= _rotated(x[b] + x[a], 9)
            x[d] ^= _rotated(x[c] + x[b], 13)
            x[a] ^= _rotated(x[d] + x[c], 18)
    return x


def _rotated(word: int, bits: int) -> int:
    word &= _MASK
    return ((word << bits) | (word >> (32 - bits))) & _MASK
