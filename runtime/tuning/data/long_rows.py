"""Rows that are longer than the limit: which of their messages stay.

What is left begins with the system's message and a question, so that no answer is trained without what it
answers. Does not know templates or tokens: whether a row fits is asked of the caller. Start at
`without_oldest`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from runtime.tuning.data.answers import SYSTEM_ROLES
from runtime.tuning.data.example import Example
from runtime.tuning.data.turns import labelled_turns

Fits = Callable[[Example], bool]
"""Whether a row, as far as its last labelled turn, is short enough."""


def with_turns(example: Example, turns: Sequence[int]) -> Example:
    """Return `example` up to the last of `turns`, in which these alone are labelled."""
    others = set(labelled_turns(example)).difference(turns)
    messages = example.messages[: turns[-1] + 1]
    return replace(example, messages=messages, untrained=example.untrained | others)


def exchanges(example: Example) -> Iterator[Example]:
    """Yield `example` once for each question whose answers are labelled: up to the last of these."""
    users = [index for index, message in enumerate(example.messages) if message["role"] == "user"]
    for _, turns in groupby(labelled_turns(example), key=lambda turn: bisect_left(users, turn)):
        yield with_turns(example, [*turns])


def without_oldest(example: Example, fits: Fits) -> Example:
    """Return `example` without its oldest turns (not the system's), as few as make it fit.

    Where the last question and its answers alone do not fit, these are what is left.
    """
    turns = labelled_turns(example)
    system = int(bool(example.messages) and example.messages[0]["role"] in SYSTEM_ROLES)
    users = range(system + 1, turns[-1] if turns else 0)
    starts = [system, *(index for index in users if example.messages[index]["role"] == "user")]
    # From the end, so that the time it takes is that of what fits and not of the whole row.
    fitting, step = len(starts) - 1, 1
    while fitting - step >= 0 and fits(_from(example, starts[fitting - step], system)):
        fitting, step = fitting - step, step * 2
    too_long = max(fitting - step, -1)
    while fitting - too_long > 1:
        middle = (fitting + too_long) // 2
        if fits(_from(example, starts[middle], system)):
            fitting = middle
        else:
            too_long = middle
    return _from(example, starts[fitting], system)


def without_last_steps(example: Example, fits: Fits) -> Example:
    """Return `example` as far as the last labelled turn with which it fits, at least the first."""
    turns = labelled_turns(example)
    if not turns:
        return example
    fitting = bisect_left(turns, True, key=lambda turn: not fits(_until(example, turn)))
    return _until(example, turns[max(fitting, 1) - 1])


def _until(example: Example, turn: int) -> Example:
    return replace(example, messages=example.messages[: turn + 1])


def _from(example: Example, start: int, system: int) -> Example:
    """Return `example` from message `start` on, after its first `system` messages."""
    kept = [*range(system), *range(start, len(example.messages))]
    return replace(
        example,
        messages=tuple(example.messages[index] for index in kept),
        untrained=frozenset(new for new, old in enumerate(kept) if old in example.untrained),
    )
