"""Flags as controllers write them: any order, `--k=v` and `--k v`, some meant for another program.

Does not know which flags there are. Start at `read`.
"""

import re
from collections.abc import Sequence

_NEGATIVE = re.compile(r"-\d")
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def read(arguments: Sequence[str]) -> dict[str, str | None]:
    """Return the flags by name, dashes written as underscores; None is the value of a bare flag.

    The last of several wins. A word that is neither a flag nor the value of one is left out: there is
    nothing it could mean.
    """
    found: dict[str, str | None] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            continue
        name, equals, value = word[2:].partition("=")
        follows = bool(words) and (not words[0].startswith("-") or bool(_NEGATIVE.match(words[0])))
        found[name.replace("-", "_")] = value if equals else words.pop(0) if follows else None
    return found


def truth(value: str | None) -> bool | None:
    """Return what a bare flag (None, so true) or its value means, None for a word that is no truth value."""
    word = "true" if value is None else value.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None
