"""The random numbers of answers: one stream per seed, one number per position of the answer, in any order.

Counter-based: a number is a hash of (seed, position), made of integers alone. So it is the same on every
device, alone and in a batch, after a draft, and for an answer that is computed again. Start at `uniform`.
"""

import secrets

import numpy as np
from numpy.typing import NDArray

_BITS = (1 << 64) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""


def key_of(seed: int | None) -> int:
    """Return the key of the stream of `seed`, of 64 bits with or without a sign; None is a new stream."""
    if seed is None:
        return secrets.randbits(64)
    return int(_mixed(np.array([seed & _BITS], np.uint64))[0])


def uniform(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return a number in [0, 1), a multiple of 2**-53, for each stream at its position."""
    return (_mixed(keys + positions * _STEP) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output for the states before `values`; arithmetic is modulo 2**64."""
    mixed = values + _STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _FACTORS[1]
    return mixed ^ (mixed >> np.uint64(31))
