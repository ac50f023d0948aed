"""Every row once, and the same plan on every rank."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from runtime.tuning.data.batching import BatchPlan, group, pack, partition

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=60)


@given(lengths, st.integers(1, 5))
def test_ranks_partition_rows_none_twice_none_lost(sizes: list[int], world: int) -> None:
    per_rank = partition(range(len(sizes)), sizes, world)
    assert Counter(row for rows in per_rank for row in rows) == Counter(range(len(sizes)))
    tokens = [sum(sizes[row] for row in rows) for rows in per_rank]
    assert max(tokens) - min(tokens) <= max(sizes)


@given(lengths, st.integers(400, 900))
def test_packs_and_groups_hold_every_row_within_the_budget(sizes: list[int], budget: int) -> None:
    rows = range(len(sizes))
    for arrange in (pack, group):
        arranged = arrange(rows, sizes, budget)
        assert sorted(row for content in arranged for row in content) == list(rows)
    assert all(sum(sizes[row] for row in content) <= budget for content in pack(rows, sizes, budget))
    assert all(max(sizes[r] for r in c) * len(c) <= budget for c in group(rows, sizes, budget))


@given(lengths, st.integers(1, 4), st.integers(1, 9))
def test_an_epoch_uses_every_row_once_over_all_ranks(sizes: list[int], world: int, step_rows: int) -> None:
    plan = BatchPlan(tuple(sizes), tuple(sizes), step_rows, 400, "packed", world=world)
    seen: Counter[int] = Counter()
    for rows in plan.steps(0):
        batches = [plan.rank_batch(rows, rank) for rank in range(world)]
        assert len({batch.labelled_tokens for batch in batches}) == 1
        seen.update(
            row for batch in batches if not batch.idle for rows in batch.micro_batches for row in rows
        )
    assert seen == Counter(range(len(sizes)))
    assert len(list(plan.steps(0))) == plan.steps_per_epoch


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 9))
def test_all_sequences_of_a_row_are_in_one_step(per_row: list[int], world: int, step_rows: int) -> None:
    owner = [row for row, count in enumerate(per_row) for _ in range(count)]
    sizes = tuple(range(1, len(owner) + 1))
    plan = BatchPlan(sizes, sizes, step_rows, 400, "packed", world=world, sequences_per_row=tuple(per_row))
    steps = list(plan.steps(0))
    assert len(steps) == plan.steps_per_epoch == -(-len(per_row) // step_rows)
    assert sorted(sequence for step in steps for sequence in step) == list(range(len(owner)))
    rows = [{owner[sequence] for sequence in step} for step in steps]
    assert all(len(step) <= step_rows for step in rows)
    assert sum(map(len, rows)) == len(per_row)


def test_order_follows_seed_and_epoch() -> None:
    plan = BatchPlan((5,) * 40, (2,) * 40, 8, 64, "packed", seed=1)
    assert list(plan.steps(0)) == list(plan.steps(0))
    assert list(plan.steps(0)) != list(plan.steps(1))
    assert list(plan.steps(0)) != list(BatchPlan((5,) * 40, (2,) * 40, 8, 64, "packed", seed=2).steps(0))


def test_last_short_step_is_dropped_only_when_requested() -> None:
    assert BatchPlan((5,) * 10, (2,) * 10, 4, 64, "packed").steps_per_epoch == 3
    assert BatchPlan((5,) * 10, (2,) * 10, 4, 64, "packed", drop_last=True).steps_per_epoch == 2
    assert BatchPlan((5,) * 3, (2,) * 3, 4, 64, "packed", drop_last=True).steps_per_epoch == 1
