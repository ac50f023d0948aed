"""The key-value pool: how many positions of each kind of layer fit into what is free."""

import pytest

from runtime.errors import CapacityError
from runtime.memory.pool import (
    CACHE_SHARE,
    ArenaKind,
    PoolSize,
    beside,
    pool_that_fits,
    sampling_bytes,
    window_span,
)

FULL, WINDOW = ArenaKind(1000), ArenaKind(500, 64, 128)


def fitted(kinds: tuple[ArenaKind, ...], room: int, *, rows: int = 4, context: int = 1000) -> PoolSize:
    """Return the pool in `room` bytes for keys and values."""
    free = int(room / CACHE_SHARE) + 2
    return pool_that_fits(kinds, rows=rows, context_tokens=context, free_bytes=free)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (10_000_000, PoolSize(4, 1000, (4000,))),  # no more than all sequences can use
        (2_500_000, PoolSize(4, 1000, (2500,))),
        (600_000, PoolSize(4, 600, (600,))),  # the context gives way where one sequence of it does not fit
    ],
)
def test_sequences_share_what_fits(room: int, expected: PoolSize) -> None:
    assert fitted((FULL,), room) == expected


def test_kinds_have_equally_many_positions_until_the_windows_of_all_sequences_fit() -> None:
    assert fitted((FULL, WINDOW), 600_000, context=200).positions == (400, 400)
    assert fitted((FULL, WINDOW), 1_000_000, context=200).positions == (744, 512)
    assert fitted((WINDOW,), 1_000_000).positions == (512,)


def test_windows_give_way_to_one_sequence_of_the_whole_context() -> None:
    size = fitted((FULL, WINDOW), 1_100_000)
    assert (size.context_tokens, size.positions) == (1000, (1024, 152))
    assert size.tokens == 152


def test_states_of_sequences_are_taken_off_first() -> None:
    size = pool_that_fits((FULL,), rows=4, context_tokens=100, free_bytes=1_000_000, sequence_bytes=150_000)
    assert size.positions == (200,)


def test_no_room_for_a_short_sequence_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="one sequence of 16 tokens needs 16 MiB"):
        pool_that_fits((ArenaKind(1 << 20),), rows=1, context_tokens=4096, free_bytes=10 << 20)


def test_a_window_leaves_room_for_a_step_and_for_seldom_moves() -> None:
    assert window_span(16) == 16 + 512
    assert window_span(4096) == 5120


def test_a_model_without_keys_and_values_has_room_for_every_token() -> None:
    size = pool_that_fits([], rows=2, context_tokens=100, free_bytes=1 << 20, sequence_bytes=1000)
    assert (size.positions, size.tokens) == ((), 200)


def test_choosing_tokens_has_its_memory_beside_the_pool_where_the_rest_is_too_little() -> None:
    gemma = sampling_bytes(256, 262_144)  # 1.9 GB
    assert gemma == 256 * 262_144 * 28
    assert beside(gemma, 100 << 30) == 100 << 30, "a fifth of it is more"
    small = 6 << 30
    assert int(beside(gemma, small) * CACHE_SHARE) == pytest.approx(small - gemma, abs=2)
    assert int(beside(gemma, 1 << 30) * CACHE_SHARE) == pytest.approx(1 << 29, abs=2), "row by row"
