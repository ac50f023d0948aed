"""Which module a pattern of peft's LoraConfig means: peft's own rules, within a time limit.

An adapter's patterns come from outside, and a regular expression can take for ever: whatever is more than a
name is matched in a process of its own that is killed in time. Does not know adapters or models; the rules
are those of peft 0.21 (a test compares). Start at `first_matches`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import ConfigError

TIME_LIMIT_S = 10.0
"""For all patterns of one key; names of thousands of modules take well under a second."""
MOST_CHARACTERS = 4096
"""Of one pattern."""
MOST_PATTERNS = 65_536

_KEY = r"(.*\.)?({})$"
"""How peft's get_pattern_key reads a key of rank_pattern and alpha_pattern."""
_LAYERS = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_SAVED = r"(^|.*\.){}($|\..*)"
_ANY_LAYERS = r".*?\.[^.]*\.(?P<idx>\d+)\."

_NAME = re.compile(r"\^?(?:[\w-]|\\?\.)*\$?")
"""A pattern without repetitions, groups and alternatives: matching takes no longer than reading."""
_CHEAP_MATCHES = 100_000


@dataclass(frozen=True, slots=True)
class Match:
    """What was found for one path."""

    index: int
    """Of the first pattern that matches."""
    layer: int | None
    """The layer's number, where the rule reads one."""


def first_matches(
    patterns: Sequence[str], paths: Sequence[str], *, rule: str | None, what: str
) -> list[Match | None]:
    """Return for each of `paths` the first of `patterns` that matches it.

    `rule` is the expression around each pattern, matched from the path's beginning; None matches a pattern
    with the whole path. Raises ConfigError, which calls the patterns `what`, for one that is no regular
    expression, is too long, or takes too long.
    """
    if not patterns or not paths:
        return [None] * len(paths)
    _check_size(patterns, what)
    cheap = len(patterns) * len(paths) <= _CHEAP_MATCHES and all(map(_NAME.fullmatch, patterns))
    found = _match(patterns, paths, rule) if cheap else _match_elsewhere(patterns, paths, rule, what)
    return [None if each is None else Match(*each) for each in found]


def pattern_keys(patterns: Sequence[str], paths: Sequence[str], what: str) -> dict[str, str]:
    """Return the key of rank_pattern or alpha_pattern that each path takes its value from, if any."""
    found = first_matches(patterns, paths, rule=_KEY, what=what)
    return {path: patterns[match.index] for path, match in zip(paths, found, strict=True) if match}


def saved(names: Sequence[str], paths: Sequence[str], what: str) -> set[str]:
    """Return the paths at and below the modules that modules_to_save names."""
    found = first_matches(names, paths, rule=_SAVED, what=what)
    return {path for path, match in zip(paths, found, strict=True) if match}


def named(names: str | Sequence[str], paths: Sequence[str], what: str) -> set[str]:
    """Return the paths that target_modules or exclude_modules means: ends of names, or one expression."""
    if isinstance(names, str):
        found = first_matches([names], paths, rule=None, what=what)
        return {path for path, match in zip(paths, found, strict=True) if match}
    wanted = set(names)
    return {path for path in paths if any(end in wanted for end in _ends(path))}


def within_layers(layers: Sequence[int], names: Sequence[str], paths: Sequence[str], what: str) -> set[str]:
    """Return the paths in the layers numbered `layers` of the lists called `names`, of any list without."""
    rule, patterns = (_LAYERS, names) if names else (_ANY_LAYERS, [""])
    found = first_matches(patterns, paths, rule=rule, what=what)
    return {path for path, match in zip(paths, found, strict=True) if match and match.layer in layers}


def _ends(path: str) -> list[str]:
    """Return `path` and what follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _check_size(patterns: Sequence[str], what: str) -> None:
    longest = max(patterns, key=len)
    if len(longest) > MOST_CHARACTERS:
        raise ConfigError(
            f"{what}: a pattern has {len(longest)} characters, expected at most {MOST_CHARACTERS}"
        )
    if len(patterns) > MOST_PATTERNS:
        raise ConfigError(f"{what}: has {len(patterns)} patterns, expected at most {MOST_PATTERNS}")


def _match(
    patterns: Sequence[str], paths: Sequence[str], rule: str | None
) -> list[tuple[int, int | None] | None]:
    compiled = [re.compile(pattern if rule is None else rule.replace("{}", pattern)) for pattern in patterns]
    return [_first(compiled, path, whole=rule is None) for path in paths]


def _first(compiled: Sequence[re.Pattern[str]], path: str, *, whole: bool) -> tuple[int, int | None] | None:
    for index, pattern in enumerate(compiled):
        match = pattern.fullmatch(path) if whole else pattern.match(path)
        if match:
            layer = match.groupdict().get("idx")
            return index, None if layer is None else int(layer)
    return None


def _match_elsewhere(
    patterns: Sequence[str], paths: Sequence[str], rule: str | None, what: str
) -> list[tuple[int, int | None] | None]:
    task = json.dumps([list(patterns), list(paths), rule])
    command = [sys.executable, "-m", "runtime.lora_patterns"]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=task, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        first = next((pattern for pattern in patterns if not _NAME.fullmatch(pattern)), patterns[0])
        raise ConfigError(
            f"{what}: matching {first[:100]!r} takes more than {TIME_LIMIT_S:g} s; write a simpler pattern"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"{what}: {reason[:300]}")
    found: list[tuple[int, int | None] | None] = json.loads(done.stdout)
    return found


def _main() -> None:
    """Match what is on standard input; the result is on standard output, or why there is none on errors."""
    import warnings

    warnings.simplefilter("ignore")
    patterns, paths, rule = json.load(sys.stdin)
    for pattern in patterns:
        try:
            re.compile(pattern if rule is None else rule.replace("{}", pattern))
        except (re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            raise SystemExit(f"{pattern[:100]!r} is no regular expression: {error}") from None
    sys.stdout.write(json.dumps(_match(patterns, paths, rule)))


if __name__ == "__main__":
    _main()
