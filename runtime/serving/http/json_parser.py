"""The one parser of JSON that comes from outside: a request's body, and JSON text inside it.

Its limits come first: a body whose structure would take long to build is refused by counting its brackets
and colons. Every way in which JSON can be wrong is one RequestError of one line; half of a surrogate pair,
which clients write that cut a text inside an emoji, is U+FFFD. Knows no field. Start at `parse`.
"""

import re
from typing import Any

import jiter

from runtime.errors import RequestError, one_line

MOST_NODES = 2**16
"""Lists, objects and keys in one body. Numbers and texts cost less; the body's size bounds them."""

_BOM = b"\xef\xbb\xbf"
_REASONS = {
    "recursion limit exceeded": "it is nested deeper than 200 levels",
    "invalid unicode code point": "it is not UTF-8",
    "Detected duplicate key": "a key occurs twice in an object",
    "number out of range": "a number has more than 4300 digits",
}
"""What the parser's words mean, by a part of them; others are shown as they are."""
_HALVED = ("surrogate", "end of hex escape")
"""Parts of the parser's words for half of a surrogate pair."""
_HALF = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|[c-fC-F][0-9a-fA-F]{2}(?<!\\u[dD][89abAB]..\\u[dD]...))"
)
"""The escape of a high surrogate that no low one follows, or of a low one that follows no high one."""
_NO_UTF8 = b"\xff\xff"


def parse(sent: bytes, *, what: str = "the body") -> Any:
    """Return the value that `sent` is JSON of: UTF-8, no NaN or Infinity, no key twice in one object.

    `what` is its name in messages.

    Raises RequestError: empty, not JSON, nested deeper than 200 levels, or more than `MOST_NODES` nodes.
    """
    sent = sent.removeprefix(_BOM)
    if not sent.strip():
        missing = "the request has no body" if what == "the body" else f"{what} is empty"
        raise RequestError(f"{missing}, expected JSON")
    if len(sent) > MOST_NODES and (nodes := _nodes(sent)) > MOST_NODES:
        raise RequestError(
            f"{what} has {nodes} lists, objects and keys; at most {MOST_NODES} are taken: send less at once"
        )
    try:
        return _built(sent, catch_duplicate_keys=True)
    except ValueError as error:
        said, _, place = one_line(error, 200).rpartition(" at line ")
        reason = next((meaning for part, meaning in _REASONS.items() if part in said), said or place)
        raise RequestError(f"{what} is not valid JSON: {reason} (line {place})") from None


def complete(text: str) -> Any:
    """Return the value of JSON text, and of text that was cut what there is of it; ValueError otherwise."""
    return _built(text.encode(), partial_mode="trailing-strings")


def values(text: str) -> int:
    """Return how many values JSON text has, about, without building them."""
    outside = _outside_texts(text.encode())
    return 1 + sum(map(outside.count, (b"[", b"{", b":", b",")))


def _built(sent: bytes, **how: Any) -> Any:
    """Return the value of JSON; ValueError when it has none even without halves of surrogate pairs."""
    try:
        return jiter.from_json(sent, allow_inf_nan=False, cache_mode="keys", **how)
    except ValueError as error:
        if not any(words in str(error) for words in _HALVED):
            raise
    return jiter.from_json(_mended(sent), allow_inf_nan=False, cache_mode="keys", **how)


def _mended(sent: bytes) -> bytes:
    """Return JSON with U+FFFD for each half of a surrogate pair, as browsers write it in UTF-8."""
    if _NO_UTF8[:1] in sent:  # refused anyway
        return sent
    # A backslash that is escaped begins no escape.
    return _HALF.sub(rb"\\ufffd", sent.replace(b"\\\\", _NO_UTF8)).replace(_NO_UTF8, b"\\\\")


def _nodes(sent: bytes) -> int:
    """Return how many lists, objects and keys there are, without building them."""
    if (
        sum(map(sent.count, (b"[", b"{", b":"))) <= MOST_NODES
    ):  # many more than there are, where texts have them
        return 0
    outside = _outside_texts(sent)
    return sum(map(outside.count, (b"[", b"{", b":")))


def _outside_texts(sent: bytes) -> bytes:
    """Return JSON without its texts."""
    return b"".join(sent.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
