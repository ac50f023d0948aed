"""The one parser of JSON that comes from outside: a request's body, and JSON text inside it.

Its limits come first: a body whose structure would take long to build is refused by counting its brackets
and colons. Every way in which JSON can be wrong is one RequestError of one line. Knows no field. Start at
`parse`.
"""

from typing import Any

import jiter

from runtime.errors import RequestError, one_line

MOST_NODES = 2**16
"""Lists, objects and keys in one body. Numbers and texts cost less; the body's size bounds them."""

_BOM = b"\xef\xbb\xbf"
_REASONS = {
    "recursion limit exceeded": "it is nested deeper than 200 levels",
    "hex escape": "an escape (\\u) is half of a surrogate pair, which is no character",
    "surrogate": "an escape (\\u) is half of a surrogate pair, which is no character",
    "invalid unicode code point": "it is not UTF-8",
    "Detected duplicate key": "a key occurs twice in an object",
    "number out of range": "a number has more than 4300 digits",
}
"""What the parser's words mean, by a part of them; others are shown as they are."""


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
        return jiter.from_json(sent, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError as error:
        said, _, place = one_line(error, 200).rpartition(" at line ")
        reason = next((meaning for part, meaning in _REASONS.items() if part in said), said or place)
        raise RequestError(f"{what} is not valid JSON: {reason} (line {place})") from None


def complete(text: str) -> Any:
    """Return the value of JSON text, and of text that was cut what there is of it; ValueError otherwise."""
    sent = text.encode()
    if len(sent) > MOST_NODES and _nodes(sent) > MOST_NODES:
        raise ValueError(f"more than {MOST_NODES} lists, objects and keys")
    return jiter.from_json(sent, allow_inf_nan=False, partial_mode="trailing-strings", cache_mode="keys")


def _nodes(sent: bytes) -> int:
    """Return how many lists, objects and keys there are, without building them."""
    if (
        sum(map(sent.count, (b"[", b"{", b":"))) <= MOST_NODES
    ):  # many more than there are, where texts have them
        return 0
    outside = b"".join(sent.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return sum(map(outside.count, (b"[", b"{", b":")))
