"""Command lines as controllers write them: any order, `--k=v` and `--k v`, flags meant for other programs.

Does not know which flags exist. Start at `read`.
"""

import re
from collections.abc import Sequence

_NEGATIVE = re.compile(r"-\d")
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def read(arguments: Sequence[str]) -> dict[str, str | None]:
    """Return the flags by name, dashes written as underscores; None is the value of a bare flag.

    Of a repeated flag the last value wins. A word that is neither a flag nor the value of one is ignored:
    these programs have no positional arguments.
    """
    flags: dict[str, str | None] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            continue
        name, equals, value = word[2:].partition("=")
        has_value = bool(words) and (not words[0].startswith("-") or bool(_NEGATIVE.match(words[0])))
        flags[name.replace("-", "_")] = value if equals else words.pop(0) if has_value else None
    return flags


def truth(value: str | None) -> bool | None:
    """Return the truth value of a flag, True for a bare one (None); None for a word that is neither."""
    word = "true" if value is None else value.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None
