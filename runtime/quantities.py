"""Amounts as Kubernetes writes them: 500m, 2, 16G, 20Gi.

Knows their spelling, not what they are amounts of. Start at `read_bytes`.
"""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

QUANTITY = re.compile(r"\+?(\d+(?:\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?", re.ASCII)
"""A number, and a power of 1024, a power of 1000 or an exponent of 10."""

_FACTORS = {
    "": 1,
    **{f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)},
    **{letter: 1000**power for power, letter in enumerate("kMGTPE", start=1)},
}
_LONGEST = 40
"""Characters of a quantity that is read: an exponent of thousands of digits is no size."""


def read_bytes(value: Any) -> int:
    """Return how many bytes `value` stands for, a whole number or text such as 20Gi; ValueError otherwise."""
    expected = "expected bytes, as a number or as in 500Mi, 20Gi or 20G"
    text = str(value).strip()
    match = None if isinstance(value, bool) or len(text) > _LONGEST else QUANTITY.fullmatch(text)
    suffix = (match[2] or "") if match else "?"
    if match is None or (suffix not in _FACTORS and suffix[0] not in "eE"):
        raise ValueError(f"is {text[:60]!r}, {expected}")
    number = Decimal(match[1]) * _FACTORS[suffix] if suffix in _FACTORS else Decimal(match[1] + suffix)
    if not 1 <= number < 2**63:
        raise ValueError(f"is {text!r}, {expected}, from 1 to {2**63 - 1}")
    return int(number)


def show_bytes(count: int) -> str:
    """Return `count` bytes for a reader, rounded: "2.5 GiB"."""
    for name, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count} bytes"


ByteQuantity = Annotated[int, BeforeValidator(read_bytes), Field(ge=1)]
"""A setting in bytes, written as a number or as a quantity."""
