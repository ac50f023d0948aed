"""What becomes of a setting that a user may write, and how its value is read.

Knows types and fates, not names. Start at `Argument`, `Range` and `read`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.config import describe, nearest
from runtime.errors import ConfigError

Fate = Literal["honoured", "harmless", "refused"]
"""Carried out; without effect, which is said where the value asks for something; an error where it does."""

_NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values that ask for nothing, whatever the setting."""


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a setting may be, or its type where that is no number."""

    kind: str = "float"
    least: float = 0.0
    above: bool = False
    """Whether `least` itself is excluded."""
    most: float = math.inf
    below: bool = False
    """Whether `most` itself is excluded."""
    steps: bool = False
    """Whether it counts steps, or below 1 is a share of them."""

    def check(self, value: Any, what: str) -> Any:
        """Return `value` as the setting's type; ConfigError when it is outside the range."""
        value = read(value, self.kind, what)
        if isinstance(value, str | bool) or value is None:
            return value
        low = value <= self.least if self.above else value < self.least
        high = value >= self.most if self.below else value > self.most
        if low or high or (self.steps and value > 1 and value != int(value)):
            raise ConfigError(f"{what} is {value}, expected {self._text()}")
        return value

    def _text(self) -> str:
        if self.steps:
            return "a number of steps, or below 1 a share of them"
        low = f"above {self.least:g}" if self.above else f"of at least {self.least:.10g}"
        bound = "below" if self.below else "at most"
        high = "" if self.most == math.inf else f" and {bound} {self.most:.10g}"
        return f"a number {low}{high}"


@dataclass(frozen=True, slots=True)
class Argument:
    """One setting."""

    kind: str
    """Name of its type (`?`: may be null), or its choices with `|`."""
    fate: Fate = "honoured"
    why: str = ""
    """What is done instead, or why it is refused and what to do."""
    silent: tuple[Any, ...] = (False,)
    """Values that ask for nothing, or for what is always done."""
    range: Range | None = None
    keys: "Mapping[str, Argument]" = field(default_factory=dict)
    """Of a mapping."""
    offered: tuple[str, ...] = ()
    """Of its choices, those that an error may name; all where empty."""

    def asks(self, value: Any) -> bool:
        """Whether `value` asks for something that a user would miss."""
        nothing = _NOTHING + self.silent
        if value in nothing:
            return False
        try:
            return read(value, self.kind, "") not in nothing
        except ConfigError:  # of the wrong type, it asks for something all the same
            return True


def harmless(kind: str, why: str, *silent: Any) -> Argument:
    """Return a setting without effect here; `silent` values are not worth a word."""
    return Argument(kind, "harmless", why, silent or (False,))


def refused(kind: str, why: str, *silent: Any) -> Argument:
    """Return a setting that is an error, except for `silent` values, which ask for nothing."""
    return Argument(kind, "refused", why, silent or (False,))


def honoured(value: Any, argument: Argument, what: str) -> Any:
    """Return `value` of the right type and in range, a mapping with its honoured keys only.

    ConfigError when it is refused, or wrong; None when nothing of it is honoured. `what` names it in errors.
    """
    if argument.fate == "refused":
        if argument.asks(value):
            raise ConfigError(f"{what} cannot be used: {argument.why}")
        return None
    value = read(value, argument.kind, what, offered=argument.offered)
    if value is not None and argument.range is not None:
        value = argument.range.check(value, what)
    if value and argument.keys:
        value = {
            key: honoured(part, _key(key, argument, what), f"{what} '{key}'") for key, part in value.items()
        }
        value = {key: part for key, part in value.items() if part is not None} or None
    return value if argument.fate == "honoured" else None


def without_effect(name: str, value: Any, argument: Argument) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) where `value`, or a key of it, asks for something but has no effect."""
    if argument.fate == "harmless" and not argument.keys and argument.asks(value):
        yield name, argument.why
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key in argument.keys:
                yield from without_effect(f"{name}.{key}", part, argument.keys[key])


def _key(key: str, argument: Argument, what: str) -> Argument:
    if key not in argument.keys:
        hint = nearest(key, argument.keys) or f"; known: {', '.join(argument.keys)}"
        raise ConfigError(f"{what} has the unknown key '{key}'{hint}")
    return argument.keys[key]


_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def read(value: Any, kind: str, what: str, *, offered: tuple[str, ...] = ()) -> Any:
    """Return `value` as `kind`: the name of a type, with `?` where null is allowed, or choices with `|`.

    An error about a choice names those `offered`, or all.
    """
    if kind.endswith("?"):
        if value is None or value == "null":
            return None
        kind = kind[:-1]
    if kind in ("int", "float"):
        return _number(value, kind, what)
    if kind == "bool":
        boolean = value if isinstance(value, bool) else _BOOLEANS.get(str(value).strip().lower())
        if boolean is None:
            raise ConfigError(f"{what} is {describe(value)}, expected true or false")
        return boolean
    if kind == "list":
        return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    if kind == "mapping":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{what} is {describe(value)}, expected keys and values")
        return dict(value)
    if kind == "str":
        if isinstance(value, Mapping | list) or value is None:
            raise ConfigError(f"{what} is {describe(value)}, expected a string")
        return str(value)
    return _choice(value, kind.split("|"), what, offered)


def _choice(value: Any, choices: list[str], what: str, offered: tuple[str, ...]) -> str:
    # YAML 1.1 readers upstream may have turned an unquoted `no` into false already.
    choice = "no" if value is False and "no" in choices else str(value).strip()
    if choice not in choices:
        named = offered or choices
        hint = nearest(choice, named) or f", expected {'one of ' if named[1:] else ''}{', '.join(named)}"
        raise ConfigError(f"{what} is {describe(value)}{hint}")
    return choice


def _number(value: Any, kind: str, what: str) -> int | float:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number) or (kind == "int" and not number.is_integer()):
        expected = "a whole number" if kind == "int" else "a number"
        raise ConfigError(f"{what} is {describe(value)}, expected {expected}")
    return int(value if isinstance(value, int) else number) if kind == "int" else number
