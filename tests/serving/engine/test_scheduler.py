"""The scheduler: no sequence starves, chunks keep to the budget, only equal prefixes are shared."""

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.engine.scheduler import MIN_PREFIX_TOKENS, PromptChunk, Scheduler, Sequence, StepPlan


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
    scheduler = Scheduler(2, chunk_tokens=10)
    scheduler.admit(prompt(100), adapter=None)
    short = scheduler.admit(prompt(5, 500), adapter=None)
    plans = [step(scheduler) for _ in range(3)]
    assert plans[1].chunks[0].sequence is short
    assert plans[2].decode == (short,)


def test_a_long_prompt_is_run_though_short_ones_keep_coming() -> None:
    scheduler = Scheduler(3, chunk_tokens=10)
    long = scheduler.admit(prompt(100), adapter=None)
    for number in range(60):
        if long.filled >= 100:
            break
        for sequence in scheduler.sequences:
            if sequence is not long and len(sequence.ids) > sequence.prompt_tokens:
                scheduler.release(sequence)
        while len(scheduler.sequences) < 3:
            scheduler.admit(prompt(10, 1000 + 100 * number + len(scheduler.sequences)), adapter=None)
        step(scheduler)
    assert long.filled >= 100
    assert number < 40


def test_decoding_sequences_are_in_every_step_in_slot_order() -> None:
    scheduler = Scheduler(3, chunk_tokens=8)
    sequences = [scheduler.admit(prompt(4, 100 * n), adapter=None) for n in range(2)]
    step(scheduler)
    scheduler.admit(prompt(50, 900), adapter=None)
    for _ in range(5):
        assert step(scheduler).decode == tuple(sequences)


def test_more_of_the_prompt_is_run_when_no_sequence_decodes() -> None:
    scheduler = Scheduler(2, chunk_tokens=10, prefill_only_tokens=30)
    scheduler.admit(prompt(25), adapter=None)
    assert step(scheduler).chunks[0].count == 25
    scheduler.admit(prompt(25, 200), adapter=None)
    assert step(scheduler).chunks[0].count == 10


def test_a_free_slot_goes_to_the_prompt_with_the_same_prefix() -> None:
    scheduler = Scheduler(3, chunk_tokens=100)
    first = scheduler.admit(prompt(40), adapter=None)
    other = scheduler.admit(prompt(40, 300), adapter=None)
    step(scheduler)
    scheduler.release(first)
    scheduler.release(other)
    again = scheduler.admit((*prompt(20, 300), 1, 2), adapter=None)
    assert (again.slot, again.filled) == (other.slot, 20)
    assert scheduler.admit(prompt(40), adapter=9).filled == 0, "another adapter's keys are other keys"


def test_sequences_with_short_and_long_factors_share_no_prefix() -> None:
    scheduler = Scheduler(3, chunk_tokens=100)
    first = scheduler.admit(prompt(40), adapter=None)
    beside = scheduler.admit(prompt(40), adapter=None, long=True)
    plan = step(scheduler)
    assert [chunk.start for chunk in plan.chunks] == [0, 0]
    assert not plan.copies
    scheduler.release(first)
    scheduler.release(beside)
    again = scheduler.admit((*prompt(40), 1), adapter=None, long=True)
    assert (again.slot, again.filled) == (beside.slot, 40)
    assert scheduler.admit((*prompt(40), 1), adapter=None).slot == first.slot


def test_a_prompt_that_is_all_in_the_cache_still_runs_its_last_token() -> None:
    scheduler = Scheduler(1, chunk_tokens=100)
    sequence = scheduler.admit(prompt(40), adapter=None)
    step(scheduler)
    scheduler.release(sequence)
    scheduler.admit(prompt(40), adapter=None)
    assert step(scheduler).chunks[0].count == 1


def test_an_invalidated_prefix_is_not_reused() -> None:
    scheduler = Scheduler(1, chunk_tokens=100)
    sequence = scheduler.admit(prompt(40), adapter=3)
    step(scheduler)
    scheduler.release(sequence)
    scheduler.invalidate(3)
    assert scheduler.admit(prompt(40), adapter=3).filled == 0


def test_a_failed_step_leaves_every_sequence_as_it_was() -> None:
    scheduler = Scheduler(3, chunk_tokens=100)
    first = scheduler.admit(prompt(30), adapter=None)
    second = scheduler.admit(prompt(30, 100), adapter=None)
    assert len(scheduler.plan().chunks) == 2
    scheduler.release(second)  # what memory ran out for
    assert step(scheduler).chunks == (PromptChunk(first, 0, 30),)
    assert step(scheduler).decode == (first,)


def test_prompts_with_a_common_prefix_cost_one_pass_over_it() -> None:
    scheduler = Scheduler(8, chunk_tokens=500)
    sequences = [scheduler.admit((*prompt(200), 900 + n, 7), adapter=None) for n in range(8)]
    assert sum(chunk.count for chunk in step(scheduler).chunks) == 202
    plan = step(scheduler)
    assert [chunk.count for chunk in plan.chunks] == [2] * 7
    assert [sequence.reused for sequence in sequences] == [0] + [200] * 7


def test_a_conversation_in_the_cache_outlives_another_with_the_same_system_prompt() -> None:
    scheduler = Scheduler(2, chunk_tokens=500)
    talk = (*prompt(30), *prompt(100, 500))
    sequence = scheduler.admit(talk, adapter=None)
    step(scheduler)
    scheduler.release(sequence)
    other = scheduler.admit((*prompt(30), *prompt(40, 800)), adapter=None)
    assert other.slot != sequence.slot
    assert step(scheduler).chunks == (PromptChunk(other, 30, 40),)
    assert scheduler.admit((*talk, 1, 2), adapter=None).reused == len(talk)


@settings(max_examples=100)
@given(st.data())
def test_the_cache_holds_what_the_sequences_claim_under_random_traffic(data: st.DataObject) -> None:
    """Keeps a copy of the cache as lists, fills it by the plans, and compares before every use."""
    scheduler = Scheduler(3, chunk_tokens=7, prefill_only_tokens=11)
    cache: list[dict[int, tuple[int, int | None, bool]]] = [{} for _ in range(3)]
    steps: dict[Sequence, int] = {}
    for _ in range(40):
        if len(scheduler.sequences) < 3 and data.draw(st.booleans()):
            length = data.draw(st.integers(1, 30))
            ids = tuple(data.draw(st.sampled_from([prompt(40), prompt(40, 1)]))[:length])
            tail = data.draw(st.lists(st.integers(0, 2), max_size=3))
            adapter, long = data.draw(st.sampled_from([None, 1])), data.draw(st.booleans())
            sequence = scheduler.admit((*ids, *tail), adapter=adapter, long=long)
            steps[sequence] = 0
        plan = scheduler.plan()
        assert sum(chunk.count for chunk in plan.chunks) <= (7 if plan.decode else 11)
        for copy in plan.copies:
            assert copy.count >= MIN_PREFIX_TOKENS
            taken = {place: cache[copy.source][place] for place in range(copy.count)}
            cache[copy.sequence.slot].update(taken)
        work = [(sequence, sequence.filled, 1) for sequence in plan.decode]
        work += [(chunk.sequence, chunk.start, chunk.count) for chunk in plan.chunks]
        assert bool(work) == bool(scheduler.sequences)
        assert len({sequence.slot for sequence, _, _ in work}) == len(work)
        for sequence, start, count in work:
            held = [cache[sequence.slot].get(place) for place in range(start)]
            assert held == [(token, sequence.adapter, sequence.long) for token in sequence.ids[:start]]
            for place in range(start, start + count):
                cache[sequence.slot][place] = (sequence.ids[place], sequence.adapter, sequence.long)
        finishing = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        scheduler.commit(plan)
        for sequence in (*plan.decode, *finishing):
            sequence.ids.append(data.draw(st.integers(0, 2)))
        for sequence in scheduler.sequences:
            steps[sequence] += 1
            assert steps[sequence] < 40
            if data.draw(st.integers(0, 4)) == 0:
                scheduler.release(sequence)
