"""Prompt lookup: a draft is what followed the same tokens before; rejection pauses it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.engine.prompt_lookup import (
    FIRST_DRAFT_TOKENS,
    MAX_PAUSE_TOKENS,
    NGRAM_SIZES,
    PromptLookup,
)

A, B, C, D = 11, 12, 13, 14


def test_the_draft_is_what_followed_the_latest_occurrence_of_the_newest_tokens() -> None:
    ids = [A, B, C, 20, 21, A, B, C, 30, 31, 32, 33, 34, 5, A, B, C]
    assert PromptLookup().draft(ids, most=16) == (30, 31, 32, 33)


def test_a_longer_match_wins_over_a_later_one() -> None:
    ids = [A, B, C, 20, 21, 22, 23, D, B, C, 30, 31, 32, 33, A, B, C]
    assert PromptLookup().draft(ids, most=16) == (20, 21, 22, 23)


def test_no_draft_where_nothing_repeats_or_none_is_wanted() -> None:
    assert PromptLookup().draft([1, 2, 3, 4, 5], most=16) == ()
    assert PromptLookup().draft([1], most=16) == ()
    assert PromptLookup().draft([1, 2, 3, 1, 2, 3], most=0) == ()


def test_a_repeated_token_is_drafted_as_far_as_it_is_known() -> None:
    assert PromptLookup().draft([7] * 10, most=16) == (7,), "only one token is known to have followed"


def test_equal_bytes_that_straddle_two_tokens_are_no_match() -> None:
    # in memory 00 00 01 00 00 00 01 00 00 05 ..: from the second byte on it reads 0x100, 0x100
    ids = [0x10000, 0x10000, 0x500, 0x100, 0x100]
    assert PromptLookup().draft(ids, most=4) == ()


def test_a_fully_accepted_draft_doubles_the_next() -> None:
    ids = [*range(100, 164), 1, 2, 100, 101, 102]
    lookup = PromptLookup()
    first = lookup.draft(ids, most=16)
    lookup.record(drafted=len(first), accepted=len(first), length=len(ids))
    assert (len(first), len(lookup.draft(ids, most=16)), len(lookup.draft(ids, most=6))) == (4, 8, 6)


def test_rejected_drafts_are_followed_by_longer_and_longer_pauses() -> None:
    lookup, ids, pauses = PromptLookup(), [A, B, C, D] * 2, []
    for _ in range(8):
        begun = len(ids)
        while not lookup.draft(ids, most=4):
            ids.append([A, B, C, D][len(ids) % 4])
        pauses.append(len(ids) - begun)
        lookup.record(drafted=4, accepted=0, length=len(ids))
    assert pauses == [0, 2, 4, 8, 16, 32, MAX_PAUSE_TOKENS, MAX_PAUSE_TOKENS]
    lookup.record(drafted=4, accepted=1, length=len(ids))
    assert lookup.draft(ids, most=4), "one accepted token ends the pause"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.randoms())
def test_a_growing_sequence_gets_the_same_drafts_as_a_complete_one(
    ids: list[int], draw: random.Random
) -> None:
    growing = PromptLookup()
    for length in sorted(draw.sample(range(1, len(ids) + 1), min(5, len(ids)))):
        begin = ids[:length]
        drafted = growing.draft(begin, most=16)
        expected = PromptLookup().draft(begin, most=16)
        assert drafted == expected
        assert len(drafted) <= FIRST_DRAFT_TOKENS
        if drafted:
            places = [p for p in range(length) if tuple(begin[p : p + len(drafted)]) == drafted]
            shortest = NGRAM_SIZES[-1]
            assert any(begin[p - shortest : p] == begin[-shortest:] for p in places)
