"""Guesses: what followed the same tokens before; wrong ones make pauses, right ones longer guesses."""

import random

from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.engine.prompt_lookup import LONGEST_REST, TAILS, WIDTH, PromptLookup

A, B, C, D = 11, 12, 13, 14


def test_the_guess_is_what_followed_the_newest_tokens_when_they_last_stood_there() -> None:
    ids = [A, B, C, 20, 21, A, B, C, 30, 31, 32, 33, 34, 5, A, B, C]
    assert PromptLookup().guess(ids, most=16) == (30, 31, 32, 33)


def test_a_longer_match_goes_before_a_later_one() -> None:
    ids = [A, B, C, 20, 21, 22, 23, D, B, C, 30, 31, 32, 33, A, B, C]
    assert PromptLookup().guess(ids, most=16) == (20, 21, 22, 23)


def test_nothing_is_guessed_where_nothing_repeats_or_nothing_is_wanted() -> None:
    assert PromptLookup().guess([1, 2, 3, 4, 5], most=16) == ()
    assert PromptLookup().guess([1], most=16) == ()
    assert PromptLookup().guess([1, 2, 3, 1, 2, 3], most=0) == ()


def test_a_repetition_under_way_is_guessed_to_its_end() -> None:
    assert PromptLookup().guess([7] * 10, most=16) == (7,), "only one token is known to have followed"


def test_bytes_that_look_alike_at_another_place_are_no_match() -> None:
    # in memory 00 00 01 00 00 00 01 00 00 05 ..: from the second byte on it reads 0x100, 0x100
    ids = [0x10000, 0x10000, 0x500, 0x100, 0x100]
    assert PromptLookup().guess(ids, most=4) == ()


def test_a_guess_that_was_right_doubles_the_next() -> None:
    ids = [*range(100, 164), 1, 2, 100, 101, 102]
    guesser = PromptLookup()
    first = guesser.guess(ids, most=16)
    guesser.learn(guessed=len(first), right=len(first), length=len(ids))
    assert (len(first), len(guesser.guess(ids, most=16)), len(guesser.guess(ids, most=6))) == (4, 8, 6)


def test_wrong_guesses_are_followed_by_longer_and_longer_rests() -> None:
    guesser, ids, pauses = PromptLookup(), [A, B, C, D] * 2, []
    for _ in range(8):
        begun = len(ids)
        while not guesser.guess(ids, most=4):
            ids.append([A, B, C, D][len(ids) % 4])
        pauses.append(len(ids) - begun)
        guesser.learn(guessed=4, right=0, length=len(ids))
    assert pauses == [0, 2, 4, 8, 16, 32, LONGEST_REST, LONGEST_REST]
    guesser.learn(guessed=4, right=1, length=len(ids))
    assert guesser.guess(ids, most=4), "one right token ends the rest"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.randoms())
def test_growing_rows_are_guessed_as_whole_ones(ids: list[int], draw: random.Random) -> None:
    growing = PromptLookup()
    for length in sorted(draw.sample(range(1, len(ids) + 1), min(5, len(ids)))):
        begin = ids[:length]
        guessed = growing.guess(begin, most=16)
        expected = PromptLookup().guess(begin, most=16)
        assert guessed == expected
        assert len(guessed) <= WIDTH
        if guessed:
            places = [p for p in range(length) if tuple(begin[p : p + len(guessed)]) == guessed]
            shortest = TAILS[-1]
            assert any(begin[p - shortest : p] == begin[-shortest:] for p in places)
