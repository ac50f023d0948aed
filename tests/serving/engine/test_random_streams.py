"""The random numbers of a seed: known values, evenly spread, and apart from those of other seeds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.engine.random_streams import key_of, uniform

BITS = (1 << 64) - 1


def split_mix(state: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014), in whole numbers: the output for the state after `state`."""
    state = (state + 0x9E3779B97F4A7C15) & BITS
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & BITS
    return state ^ (state >> 31)


def numbers(seed: int, count: int) -> np.ndarray:
    return uniform(np.full(count, key_of(seed), np.uint64), np.arange(count, dtype=np.uint64))


def test_the_reference_is_split_mix() -> None:
    assert split_mix(0) == 0xE220A8397B1DCDAF  # the first output of its author's program for the seed 0


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31))
def test_a_number_is_that_of_its_seed_and_position(seed: int, position: int) -> None:
    key = split_mix(seed & BITS)
    expected = split_mix((key + position * 0x9E3779B97F4A7C15) & BITS) >> 11
    others = np.array([7, key_of(seed), 0], np.uint64), np.array([1, position, 2**32], np.uint64)
    assert uniform(*others)[1] == expected / 2**53


def test_numbers_are_spread_evenly_along_a_stream_and_across_seeds() -> None:
    along, across = numbers(1, 40_000), np.array([numbers(seed, 1)[0] for seed in range(20_000)])
    for drawn in (along, across):
        counts = np.histogram(drawn, 64, (0, 1))[0]
        expected = len(drawn) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 110, "chi-square, 63 degrees: p < 0.0003"
    for lag in (1, 2, 5):
        assert abs(np.corrcoef(along[lag:], along[:-lag])[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers(1, 9999), numbers(2, 9999))[0, 1]) < 0.04


def test_without_a_seed_each_stream_is_a_new_one() -> None:
    assert len({key_of(None) for _ in range(50)}) == 50
