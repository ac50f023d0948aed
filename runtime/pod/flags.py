"""Command lines as controllers write them: any order, `--k=v` and `--k v`, flags meant for other programs.

Does not know which flags exist. Start at `parse`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

_NEGATIVE = re.compile(r"-\d")
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The flags by name, dashes written as underscores, and the words that belong to none."""

    flags: dict[str, str | None]
    """None is the value of a bare flag; of a repeated flag the last value wins."""
    stray: tuple[str, ...]


def read(arguments: Sequence[str]) -> dict[str, str | None]:
    """Return the flags by name; a word that is neither a flag nor the value of one is ignored."""
    return parse(arguments).flags


def parse(
    arguments: Sequence[str],
    *,
    lists: Collection[str] = (),
    short: Mapping[str, str] = MappingProxyType({}),
) -> CommandLine:
    """Return the flags of a command line, and what it holds beside them.

    A flag in `lists` takes all words up to the next flag, one a line. `short` gives the names of
    one-dash flags ("tp"); another one is a stray word.
    """
    flags: dict[str, str | None] = {}
    stray = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        dashes = len(word) - len(word.lstrip("-"))
        name, equals, value = word[dashes:].partition("=")
        if dashes == 1:
            name = short.get(name, "")
        if dashes not in (1, 2) or not name:
            stray.append(word)
            continue
        name = name.replace("-", "_")
        values = [value] if equals else []
        while words and _is_value(words[0]) and (not values or name in lists):
            values.append(words.pop(0))
        flags[name] = "\n".join(values) if values else None
    return CommandLine(flags, tuple(stray))


def _is_value(word: str) -> bool:
    return not word.startswith("-") or bool(_NEGATIVE.match(word))


def truth(value: str | None) -> bool | None:
    """Return the truth value of a flag, True for a bare one (None); None for a word that is neither."""
    word = "true" if value is None else value.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None
