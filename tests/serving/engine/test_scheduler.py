"""The scheduler: no sequence starves, chunks keep to the budget, only equal prefixes are shared."""

from collections.abc import Sequence as Sized
from typing import Any

import pytest

from runtime.serving.engine.pool_map import ArenaSize
from runtime.serving.engine.scheduler import PromptChunk, Scheduler, Sequence, StepPlan


def make(
    rows: int, *, positions: int = 4000, windows: Sized[int | None] = (None,), **chunks: int
) -> Scheduler:
    sizes = [ArenaSize(positions, window) for window in windows]
    return Scheduler(sizes, max_sequences=rows, **{"chunk_tokens": 100} | chunks)  # type: ignore[arg-type]


def admit(scheduler: Scheduler, ids: Sized[int], *, answer: int = 100, **options: Any) -> Sequence:
    """Admit a request for which there is room."""
    sequence = scheduler.admit(ids, **{"adapter": None, "most": len(ids) + answer} | options)
    assert sequence is not None
    return sequence


def step(scheduler: Scheduler) -> StepPlan:
    """Run one step in which every sequence's next token is 7."""
    plan = scheduler.plan()
    finishing = [chunk.sequence for chunk in plan.chunks if chunk.completes]
    scheduler.commit(plan)
    for sequence in (*plan.decode, *finishing):
        sequence.ids.append(7)
    return plan


def prompt(length: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + length))


def test_a_short_prompt_behind_a_long_one_waits_for_one_chunk() -> None:
    scheduler = make(2, chunk_tokens=10)
    admit(scheduler, prompt(100))
    short = admit(scheduler, prompt(5, 500))
    plans = [step(scheduler) for _ in range(3)]
    assert plans[1].chunks[0].sequence is short
    assert plans[2].decode == (short,)


def test_a_long_prompt_is_run_though_short_ones_keep_coming() -> None:
    scheduler = make(3, chunk_tokens=10)
    long = admit(scheduler, prompt(100))
    for number in range(60):
        if long.filled >= 100:
            break
        for sequence in scheduler.sequences:
            if sequence is not long and len(sequence.ids) > sequence.prompt_tokens:
                scheduler.release(sequence)
        while len(scheduler.sequences) < 3:
            admit(scheduler, prompt(10, 1000 + 100 * number + len(scheduler.sequences)))
        step(scheduler)
    assert long.filled >= 100
    assert number < 40


def test_decoding_sequences_are_in_every_step_the_oldest_first() -> None:
    scheduler = make(3, chunk_tokens=8)
    sequences = [admit(scheduler, prompt(4, 100 * n)) for n in range(2)]
    step(scheduler)
    admit(scheduler, prompt(50, 900))
    for _ in range(5):
        assert step(scheduler).decode == tuple(sequences)


def test_more_of_the_prompt_is_run_when_no_sequence_decodes() -> None:
    scheduler = make(2, chunk_tokens=10, prefill_only_tokens=30)
    admit(scheduler, prompt(25))
    assert step(scheduler).chunks[0].count == 25
    admit(scheduler, prompt(25, 200))
    assert step(scheduler).chunks[0].count == 10


def test_a_prompt_with_the_same_prefix_continues_an_ended_extent() -> None:
    scheduler = make(3)
    first = admit(scheduler, prompt(40))
    other = admit(scheduler, prompt(40, 300))
    step(scheduler)
    start = other.extents[0].start
    scheduler.release(first)
    scheduler.release(other)
    again = admit(scheduler, (*prompt(20, 300), 1, 2))
    assert (again.extents[0].start, again.filled) == (start, 20)
    assert admit(scheduler, prompt(40), adapter=9).filled == 0, "another adapter's keys are other keys"


def test_sequences_with_short_and_long_factors_share_no_prefix() -> None:
    scheduler = make(3)
    first = admit(scheduler, prompt(40))
    beside = admit(scheduler, prompt(40), long=True)
    plan = step(scheduler)
    assert [chunk.start for chunk in plan.chunks] == [0, 0]
    assert not scheduler.take_moves()
    start = beside.extents[0].start
    scheduler.release(first)
    scheduler.release(beside)
    again = admit(scheduler, (*prompt(40), 1), long=True)
    assert (again.extents[0].start, again.reused) == (start, 40)
    assert admit(scheduler, (*prompt(40), 1)).reused == 40


def test_a_prompt_that_is_all_in_the_cache_still_runs_its_last_token() -> None:
    scheduler = make(1, chunk_tokens=100)
    sequence = admit(scheduler, prompt(40))
    step(scheduler)
    scheduler.release(sequence)
    admit(scheduler, prompt(40))
    assert step(scheduler).chunks[0].count == 1


def test_an_invalidated_prefix_is_not_reused() -> None:
    scheduler = make(1, chunk_tokens=100)
    sequence = admit(scheduler, prompt(40), adapter=3)
    step(scheduler)
    scheduler.release(sequence)
    scheduler.invalidate(3)
    assert admit(scheduler, prompt(40), adapter=3).filled == 0


def test_a_failed_step_leaves_every_sequence_as_it_was() -> None:
    scheduler = make(3, chunk_tokens=100)
    first = admit(scheduler, prompt(30))
    second = admit(scheduler, prompt(30, 100))
    assert len(scheduler.plan().chunks) == 2
    scheduler.release(second)  # what memory ran out for
    assert step(scheduler).chunks == (PromptChunk(first, 0, 30),)
    assert step(scheduler).decode == (first,)


def test_prompts_with_a_common_prefix_cost_one_pass_over_it() -> None:
    scheduler = make(8, chunk_tokens=500)
    sequences = [admit(scheduler, (*prompt(200), 900 + n, 7)) for n in range(8)]
    assert sum(chunk.count for chunk in step(scheduler).chunks) == 202
    plan = step(scheduler)
    assert [chunk.count for chunk in plan.chunks] == [2] * 7
    assert [sequence.reused for sequence in sequences] == [0] + [200] * 7


def test_what_two_prompts_compute_for_each_other_is_copied_and_counted_once() -> None:
    """They take turns: each chunk is computed for one of them and copied for the other."""
    scheduler = make(2)
    pair = [admit(scheduler, prompt(400)) for _ in range(2)]
    computed = copied = 0
    while any(sequence.in_prompt for sequence in pair):
        computed += sum(chunk.count for chunk in step(scheduler).chunks)
        copied += sum(move.count for move in scheduler.take_moves())
    assert sum(sequence.reused for sequence in pair) == 800 - computed == copied


def test_a_conversation_in_the_cache_outlives_another_with_the_same_system_prompt() -> None:
    scheduler = make(2)
    talk = (*prompt(30), *prompt(50, 500))
    sequence = admit(scheduler, talk)
    step(scheduler)
    scheduler.release(sequence)
    other = admit(scheduler, (*prompt(30), *prompt(40, 800)))
    assert step(scheduler).chunks == (PromptChunk(other, 30, 40),)
    assert admit(scheduler, (*talk, 1, 2)).reused == len(talk)


def test_a_long_prompt_is_admitted_alone_and_many_short_ones_beside_each_other() -> None:
    """The sizes of phi-3-mini-128k on an H200: 280,000 tokens of keys and values."""
    scheduler = make(256, positions=280_000, chunk_tokens=256, prefill_only_tokens=512)
    scheduler.release(admit(scheduler, range(128_000), answer=500))
    for number in range(200):
        admit(scheduler, prompt(300, 1000 * number), answer=500)
    admit(scheduler, range(128_000), answer=500)
    assert scheduler.admit(range(128_000), adapter=None, most=128_500) is None
    assert len(scheduler.sequences) == 201


def test_requests_wait_for_room_and_begin_once_others_end() -> None:
    scheduler = make(8, positions=200)
    first = admit(scheduler, prompt(100))
    assert scheduler.admit(prompt(60, 300), adapter=None, most=70) is None
    assert scheduler.used_share == 164 / 200
    scheduler.release(first)
    admit(scheduler, prompt(60, 300), answer=10)


def test_the_prefix_used_longest_ago_makes_room_first() -> None:
    scheduler = make(8, positions=100)
    for start in (0, 1000, 2000):
        ended = admit(scheduler, prompt(30, start), answer=1)
        step(scheduler)
        scheduler.release(ended)
    scheduler.release(admit(scheduler, prompt(30), answer=1))  # used again
    other = admit(scheduler, prompt(30, 5000), answer=1)
    step(scheduler)
    scheduler.release(other)
    assert [admit(scheduler, (*prompt(30, start), 1), answer=1).reused for start in (2000, 1000)] == [30, 0]


def test_the_youngest_is_put_off_where_nothing_else_makes_room_and_runs_again() -> None:
    scheduler = make(8, positions=250, chunk_tokens=200)
    old, young = (admit(scheduler, prompt(60, start), answer=140) for start in (0, 1000))
    while not scheduler.put_off:
        step(scheduler)
    assert list(scheduler.put_off) == [young]
    held = len(young.ids)
    assert scheduler.admit(prompt(4), adapter=None, most=5) is None, "it comes before new requests"
    while len(old.ids) < 200:
        step(scheduler)
        scheduler.take_moves()
    assert scheduler.put_off
    scheduler.release(old)
    assert step(scheduler).chunks == (PromptChunk(young, 0, held),)
    assert len(young.ids) == held + 1
    assert scheduler.preemptions == 1


def test_a_sequence_that_was_put_off_can_end() -> None:
    scheduler = make(8, positions=250)
    for start in (0, 1000):
        admit(scheduler, prompt(60, start), answer=140)
    while not scheduler.put_off:
        step(scheduler)
    scheduler.release(scheduler.put_off[0])
    scheduler.release(scheduler.sequences[0])
    assert not step(scheduler).decode
    assert scheduler.used_share == 0


@pytest.mark.parametrize("windows", [(4,), (None, 4)])
def test_a_window_passes_and_what_it_has_passed_is_not_reused(windows: tuple[int | None, ...]) -> None:
    scheduler = make(2, positions=1000, windows=windows, chunk_tokens=20)
    sequence = admit(scheduler, prompt(90))
    while sequence.in_prompt:
        step(scheduler)
    extent = sequence.extents[-1]
    assert extent.capacity == 4 + 20
    assert extent.base > 0
    scheduler.release(sequence)
    assert admit(scheduler, prompt(90)).filled == 89, "the last window is there"
    assert admit(scheduler, prompt(30)).filled == 0


def test_a_full_pool_is_not_copied_for_each_token() -> None:
    """Where no gap holds a larger extent, others are moved for one."""
    scheduler = make(32, positions=20_000)
    moved = tokens = number = 0
    for _ in range(400):
        while scheduler.admit(prompt(300, 1000 * number), adapter=None, most=1300):
            number += 1
        plan = step(scheduler)
        moved += sum(move.count for move in scheduler.take_moves())
        tokens += len(plan.decode)
    assert scheduler.preemptions > 0
    assert tokens > 5_000
    assert moved < 100 * tokens
