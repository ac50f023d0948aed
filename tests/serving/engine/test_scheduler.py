"""The scheduler: no row starves, chunks keep to the budget, slots are shared only where tokens are equal."""

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.engine.scheduler import LEAST_SHARED, PromptChunk, Scheduler, Sequence, StepPlan


def step(scheduler: Scheduler) -> StepPlan:
    """Run one step, every row's next token being 7."""
    plan = scheduler.plan()
    finishing = [chunk.row for chunk in plan.chunks if chunk.completes]
    scheduler.ran(plan)
    for row in (*plan.decode, *finishing):
        row.ids.append(7)
    return plan


def prompt(length: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + length))


def test_a_short_prompt_behind_a_long_one_waits_for_one_chunk() -> None:
    scheduler = Scheduler(2, chunk_tokens=10)
    scheduler.admit(prompt(100), adapter=None)
    short = scheduler.admit(prompt(5, 500), adapter=None)
    plans = [step(scheduler) for _ in range(3)]
    assert plans[1].chunks[0].row is short
    assert plans[2].decode == (short,)


def test_a_long_prompt_is_read_though_short_ones_keep_coming() -> None:
    scheduler = Scheduler(3, chunk_tokens=10)
    long = scheduler.admit(prompt(100), adapter=None)
    for number in range(60):
        if long.filled >= 100:
            break
        for row in scheduler.rows:
            if row is not long and len(row.ids) > row.prompt_tokens:
                scheduler.retire(row)
        while len(scheduler.rows) < 3:
            scheduler.admit(prompt(10, 1000 + 100 * number + len(scheduler.rows)), adapter=None)
        step(scheduler)
    assert long.filled >= 100
    assert number < 40


def test_decoding_rows_take_part_in_every_step_in_slot_order() -> None:
    scheduler = Scheduler(3, chunk_tokens=8)
    rows = [scheduler.admit(prompt(4, 100 * n), adapter=None) for n in range(2)]
    step(scheduler)
    scheduler.admit(prompt(50, 900), adapter=None)
    for _ in range(5):
        assert step(scheduler).decode == tuple(rows)


def test_more_of_the_prompt_is_run_when_nobody_waits_for_a_token() -> None:
    scheduler = Scheduler(2, chunk_tokens=10, alone_tokens=30)
    scheduler.admit(prompt(25), adapter=None)
    assert step(scheduler).chunks[0].count == 25
    scheduler.admit(prompt(25, 200), adapter=None)
    assert step(scheduler).chunks[0].count == 10


def test_a_freed_slot_is_taken_by_the_prompt_that_begins_alike() -> None:
    scheduler = Scheduler(3, chunk_tokens=100)
    first = scheduler.admit(prompt(40), adapter=None)
    other = scheduler.admit(prompt(40, 300), adapter=None)
    step(scheduler)
    scheduler.retire(first)
    scheduler.retire(other)
    again = scheduler.admit((*prompt(20, 300), 1, 2), adapter=None)
    assert (again.slot, again.filled) == (other.slot, 20)
    assert scheduler.admit(prompt(40), adapter=9).filled == 0, "another adapter's keys are other keys"


def test_short_and_long_rows_share_nothing() -> None:
    scheduler = Scheduler(3, chunk_tokens=100)
    first = scheduler.admit(prompt(40), adapter=None)
    beside = scheduler.admit(prompt(40), adapter=None, long=True)
    plan = step(scheduler)
    assert [chunk.start for chunk in plan.chunks] == [0, 0]
    assert not plan.copies
    scheduler.retire(first)
    scheduler.retire(beside)
    again = scheduler.admit((*prompt(40), 1), adapter=None, long=True)
    assert (again.slot, again.filled) == (beside.slot, 40)
    assert scheduler.admit((*prompt(40), 1), adapter=None).slot == first.slot


def test_a_whole_prompt_in_the_cache_still_runs_its_last_token() -> None:
    scheduler = Scheduler(1, chunk_tokens=100)
    row = scheduler.admit(prompt(40), adapter=None)
    step(scheduler)
    scheduler.retire(row)
    scheduler.admit(prompt(40), adapter=None)
    assert step(scheduler).chunks[0].count == 1


def test_a_forgotten_slot_is_shared_with_nobody() -> None:
    scheduler = Scheduler(1, chunk_tokens=100)
    row = scheduler.admit(prompt(40), adapter=3)
    step(scheduler)
    scheduler.retire(row)
    scheduler.forget(3)
    assert scheduler.admit(prompt(40), adapter=3).filled == 0


def test_a_step_that_failed_leaves_every_row_as_it_was() -> None:
    scheduler = Scheduler(3, chunk_tokens=100)
    first = scheduler.admit(prompt(30), adapter=None)
    second = scheduler.admit(prompt(30, 100), adapter=None)
    assert len(scheduler.plan().chunks) == 2
    scheduler.retire(second)  # what memory ran out for
    assert step(scheduler).chunks == (PromptChunk(first, 0, 30),)
    assert step(scheduler).decode == (first,)


def test_many_prompts_that_begin_alike_cost_one_pass_over_their_beginning() -> None:
    scheduler = Scheduler(8, chunk_tokens=500)
    rows = [scheduler.admit((*prompt(200), 900 + n, 7), adapter=None) for n in range(8)]
    assert sum(chunk.count for chunk in step(scheduler).chunks) == 202
    plan = step(scheduler)
    assert [chunk.count for chunk in plan.chunks] == [2] * 7
    assert [row.reused for row in rows] == [0] + [200] * 7


def test_a_conversation_in_the_cache_outlives_another_with_the_same_system_prompt() -> None:
    scheduler = Scheduler(2, chunk_tokens=500)
    talk = (*prompt(30), *prompt(100, 500))
    row = scheduler.admit(talk, adapter=None)
    step(scheduler)
    scheduler.retire(row)
    other = scheduler.admit((*prompt(30), *prompt(40, 800)), adapter=None)
    assert other.slot != row.slot
    assert step(scheduler).chunks == (PromptChunk(other, 30, 40),)
    assert scheduler.admit((*talk, 1, 2), adapter=None).reused == len(talk)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes_the_cache_holds_what_the_rows_say(data: st.DataObject) -> None:
    """Keeps a copy of the cache as lists, fills it as the plans say, and compares before every use."""
    scheduler = Scheduler(3, chunk_tokens=7, alone_tokens=11)
    cache: list[dict[int, tuple[int, int | None, bool]]] = [{} for _ in range(3)]
    asked: dict[Sequence, int] = {}
    for _ in range(40):
        if len(scheduler.rows) < 3 and data.draw(st.booleans()):
            length = data.draw(st.integers(1, 30))
            ids = tuple(data.draw(st.sampled_from([prompt(40), prompt(40, 1)]))[:length])
            tail = data.draw(st.lists(st.integers(0, 2), max_size=3))
            adapter, long = data.draw(st.sampled_from([None, 1])), data.draw(st.booleans())
            row = scheduler.admit((*ids, *tail), adapter=adapter, long=long)
            asked[row] = 0
        plan = scheduler.plan()
        assert sum(chunk.count for chunk in plan.chunks) <= (7 if plan.decode else 11)
        for copy in plan.copies:
            assert copy.count >= LEAST_SHARED
            taken = {place: cache[copy.source][place] for place in range(copy.count)}
            cache[copy.row.slot].update(taken)
        work = [(row, row.filled, 1) for row in plan.decode]
        work += [(chunk.row, chunk.start, chunk.count) for chunk in plan.chunks]
        assert bool(work) == bool(scheduler.rows)
        assert len({row.slot for row, _, _ in work}) == len(work)
        for row, start, count in work:
            held = [cache[row.slot].get(place) for place in range(start)]
            assert held == [(token, row.adapter, row.long) for token in row.ids[:start]]
            for place in range(start, start + count):
                cache[row.slot][place] = (row.ids[place], row.adapter, row.long)
        finishing = [chunk.row for chunk in plan.chunks if chunk.completes]
        scheduler.ran(plan)
        for row in (*plan.decode, *finishing):
            row.ids.append(data.draw(st.integers(0, 2)))
        for row in scheduler.rows:
            asked[row] += 1
            assert asked[row] < 40
            if data.draw(st.integers(0, 4)) == 0:
                scheduler.retire(row)
